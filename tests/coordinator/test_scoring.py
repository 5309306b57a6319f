"""Records of scores, and scores that cannot be stored; tests/evaluation and tests/runs test the scores themselves."""

from __future__ import annotations

import json
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest

from cl_dist.coordinator.scoring import _Store, cut_message, scoring_entry
from cl_dist.errors import ClDistError
from cl_dist.evaluation.result import CUT_GENERATIONS, Prediction, TaskScore
from cl_dist.progress import LineReporter
from cl_dist.state.run_folder import RunFolder, TaskFolder
from cl_dist.state.scores import How
from cl_dist.tasks.types import Task


def result(task: str, **extras: float) -> TaskScore:
    return TaskScore(task, "generate", "rouge_l", 0.5, 1, [Prediction(0, "a", "b", 0.5)], extras)


@pytest.fixture
def folder(tmp_path: Path) -> TaskFolder:
    """The folder of a finished task."""
    found = RunFolder(tmp_path).task(0, "spring")
    found.path.mkdir(parents=True)
    return found


@pytest.fixture
def reporter() -> LineReporter:
    return LineReporter(StringIO())


def test_how_a_task_was_scored() -> None:
    task = Task("spring", "generation", (), (), scored_on="dev")
    expected = {"metric": "rouge_l", "mode": "generate", "scored_on": "dev", "samples": 1}
    assert scoring_entry(task, result("spring")) == expected
    assert scoring_entry(task, result("spring", **{CUT_GENERATIONS: 2.0}))[CUT_GENERATIONS] == 2
    found = replace(task, labels=("a",), labels_from="training answers", unlisted=3)
    assert scoring_entry(found, result("spring"))["answers_outside_labels"] == 3


def test_answers_that_were_cut_are_reported() -> None:
    scoring: dict[str, How] = {
        "spring": {CUT_GENERATIONS: 2, "samples": 5},
        "summer": {CUT_GENERATIONS: 0, "samples": 5},
        "autumn": {"samples": 5},
        "winter": {CUT_GENERATIONS: 1},
    }
    assert cut_message(scoring, scoring, 20) == (
        "generated answers cut at eval.max_new_tokens (20): spring 2 of 5, winter 1 of ?"
    )
    assert cut_message(["summer", "autumn", "new"], scoring, 20) == ""


def test_predictions_and_scores_are_stored(folder: TaskFolder, reporter: LineReporter) -> None:
    store = _Store(folder, reporter)
    store.keep(result("summer"))
    store.finish({"summer": 0.5}, {"summer": {CUT_GENERATIONS: 1}})
    assert json.loads((folder.path / "evaluation" / "scoring.json").read_text()) == {"summer": {CUT_GENERATIONS: 1}}
    assert json.loads((folder.path / "evaluation.json").read_text()) == {"summer": 0.5}
    (line,) = (folder.path / "evaluation" / "summer.jsonl").read_text().splitlines()
    assert json.loads(line)["prediction"] == "a"


def test_a_failed_write_is_reported_at_the_end_and_ends_the_writing(folder: TaskFolder, reporter: LineReporter) -> None:
    (folder.path / "evaluation").touch()  # in the place of the folder
    store = _Store(folder, reporter)
    for task in ("summer", "autumn"):
        store.keep(result(task))
    with pytest.raises(ClDistError, match=r"summer\.jsonl cannot be written: .*; the scores above are complete"):
        store.finish({"summer": 0.5}, {})
    assert not (folder.path / "evaluation.json").exists()
