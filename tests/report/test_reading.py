from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from cl_dist.errors import BadInput
from cl_dist.report.reading import read_log, read_run
from tests.report.runs import write_run


def write_log(path: Path, *records: dict[str, object] | str) -> Path:
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("\n".join(lines) + "\n")
    return path


def step(task: str, number: int, loss: float | None) -> dict[str, object]:
    return {"event": "step", "task": task, "step": number, "loss": loss, "seconds": 0.1}


def test_a_run_is_read(tmp_path: Path) -> None:
    write_run(tmp_path / "run", ["a", "b", "c"], 2)
    run = read_run(tmp_path / "run")
    assert run.done == ("a", "b")
    assert run.settings["model"]["name_or_path"] == "builtin:llama-tiny"
    assert run.log.losses == {"a": {1: 3.0, 2: 2.0, 3: 1.0}, "b": {1: 3.0, 2: 2.0, 3: 1.0}}
    assert run.log.metrics == {"a": "rouge_l", "b": "rouge_l"}


def test_a_resumed_run_replaces_the_steps_after_its_checkpoint(tmp_path: Path) -> None:
    before = [step("a", number, 1.0) for number in (1, 2, 3, 4)]
    after = [step("a", number, 9.0) for number in (3,)]
    path = write_log(tmp_path / "log.jsonl", *before, {"event": "resumed", "task": "a", "step": 2}, *after)
    assert read_log(path, ("a",)).losses == {"a": {1: 1.0, 2: 1.0, 3: 9.0}}


def test_lines_that_a_kill_cut_off_are_counted_and_skipped(tmp_path: Path) -> None:
    bad = ['{"event": "st', "[1]", '{"event": "step", "task": "a"}', '{"event": "step", "task": "a", "step": "x"}']
    path = write_log(tmp_path / "log.jsonl", step("a", 1, 2.0), *bad, step("a", 2, None), step("other", 1, 1.0))
    log = read_log(path, ("a",))
    assert log.unreadable == 4
    assert list(log.losses) == ["a"]
    assert log.losses["a"][1] == 2.0
    assert math.isnan(log.losses["a"][2])


def test_bytes_that_are_not_text_are_counted(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_bytes(b"\xff\xfe\n\n")
    assert read_log(tmp_path / "log.jsonl", ("a",)).unreadable == 1


def test_a_run_without_log_and_recipe_is_read(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", ["a"], 1)
    folder.log.unlink()
    folder.config.unlink()
    run = read_run(tmp_path / "run")
    assert (run.settings, run.log.losses) == ({}, {})


def test_a_recipe_of_another_release_is_read(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", ["a"], 1)
    folder.config.write_text("model: {name_or_path: x}\nno_longer_known: 3\n")
    assert read_run(tmp_path / "run").settings["no_longer_known"] == 3


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("manifest.json", "{", r"manifest\.json is damaged: Expecting"),
        ("config.yaml", "model: [", r"config\.yaml, line 1: "),
        ("config.yaml", "- a", r"config\.yaml is damaged: it contains no settings"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, file: str, content: str, message: str) -> None:
    write_run(tmp_path / "run", ["a"], 1)
    (tmp_path / "run" / file).write_text(content)
    with pytest.raises(BadInput, match=message):
        read_run(tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"accuracy_matrix": [[0.5, 0.5]]}, "1 rows of scores, but 1 completed tasks"),
        ({"tasks": [], "completed": 0, "accuracy_matrix": []}, "it lists no tasks"),
        ({"accuracy_matrix": [[0.5], [0.5]]}, "does not have 2 scores"),
    ],
)
def test_scores_that_do_not_fit_the_tasks_are_damage(tmp_path: Path, change: dict[str, object], message: str) -> None:
    folder = write_run(tmp_path / "run", ["a", "b"], 1)
    folder.manifest.write_text(json.dumps(json.loads(folder.manifest.read_text()) | change))
    with pytest.raises(BadInput, match=message):
        read_run(tmp_path / "run")


def test_other_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match="absent: no such folder"):
        read_run(tmp_path / "absent")
    with pytest.raises(BadInput, match="file is not a folder"):
        read_run(tmp_path / "file")
    with pytest.raises(BadInput, match="holds no run"):
        read_run(tmp_path)
