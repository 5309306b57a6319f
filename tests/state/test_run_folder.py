from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cl_dist.errors import BadInput
from cl_dist.state.run_folder import RunFolder

FOLDER = RunFolder(Path("/runs/r"))


def test_places() -> None:
    task = FOLDER.task(0, "dbpedia")
    places = [FOLDER.config, FOLDER.manifest, FOLDER.metrics, FOLDER.log, FOLDER.report, FOLDER.lock]
    places += [task.model, task.predictions, task.state, task.units, task.unit_scores]
    assert [str(place.relative_to("/runs/r")) for place in places] == [
        "config.yaml",
        "manifest.json",
        "metrics.json",
        "log.jsonl",
        "report",
        ".lock",
        "tasks/01-dbpedia/model",
        "tasks/01-dbpedia/predictions",
        "tasks/01-dbpedia/state",
        "tasks/01-dbpedia/units.json",
        "tasks/01-dbpedia/unit_scores.safetensors",
    ]
    assert FOLDER.checkpoint(1, 200) == Path("/runs/r/checkpoint/task-02-step-000200")


@given(name=st.text(min_size=1, max_size=12), position=st.integers(0, 200))
def test_a_task_never_leaves_the_folder(name: str, position: int) -> None:
    try:
        path = FOLDER.task(position, name).path
    except BadInput:
        return
    assert path.resolve().parent == FOLDER.tasks
    assert path.name[:2].isdigit()


@pytest.mark.parametrize("name", ["../x", "a/b", "/etc", "a\n", "a b", "", "x" * 101, "ä", "a\0"])
def test_a_name_that_is_no_folder_name_is_refused(name: str) -> None:
    with pytest.raises(BadInput, match="letters, digits") as caught:
        FOLDER.task(0, name)
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize("name", ["..", ".", "yelp-2.1_b"])
def test_dots_are_harmless_behind_the_number(name: str) -> None:
    assert FOLDER.task(2, name).path == FOLDER.tasks / f"03-{name}"


def test_only_the_named_checkpoints_are_kept_however_old_they_are(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    steps = [(0, 999_999), (1, 5), (0, 1_000_000), (100, 1), (99, 2)]
    for task, step in steps:
        folder.checkpoint(task, step).mkdir(parents=True)
    (folder.checkpoints / ".task-02-step-000009.tmp-staging").mkdir()
    newest_first = [folder.checkpoint(task, step) for task, step in sorted(steps, reverse=True)]
    assert folder.stored_checkpoints() == newest_first
    named = [newest_first[1], newest_first[-1]]
    folder.forget_checkpoints(but=named)
    assert folder.stored_checkpoints() == named
    folder.recover()
    assert sorted(folder.checkpoints.iterdir()) == sorted(named)
    folder.forget_checkpoints()
    assert folder.stored_checkpoints() == []


def test_a_run_without_checkpoints_has_none(tmp_path: Path) -> None:
    assert RunFolder(tmp_path).stored_checkpoints() == []


def test_the_log_is_json_lines(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.append_log({"step": 1})
    folder.append_log({"step": 2})
    assert [json.loads(line)["step"] for line in folder.log.read_text().splitlines()] == [1, 2]
