"""When general ability is measured, which tasks are loaded, and how results are read; tests/runs has whole runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cl_dist.config.schema import GeneralConfig
from cl_dist.errors import BadInput
from cl_dist.evaluation import general
from cl_dist.evaluation.general import check_available, is_due, load_harness_tasks, read_score
from cl_dist.evaluation.metrics import general_ability, general_forgetting
from tests.harness_tasks import write_harness_tasks

TASKS = ("one", "two", "three")


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        ("all", {"untouched", "one", "two", "three"}),
        (("untouched", "last"), {"untouched", "three"}),
        (("first", "two"), {"one", "two"}),
        ((), set()),
    ],
)
def test_when_it_is_measured(after: Any, expected: set[str]) -> None:
    config = GeneralConfig(tasks=("hellaswag",), after=after)
    assert {place for place in ("untouched", *TASKS) if is_due(config, place, TASKS)} == expected


def results(**metrics: float) -> dict[str, Any]:
    """The harness's results for a task `t`."""
    entry = {"name": "t", "alias": "t", "sample_len": 4, **metrics}
    directions = {"acc": True, "acc_norm": True, "word_perplexity": False}
    return {"results": {"t": entry}, "higher_is_better": {"t": directions}, "n-samples": {"t": {"effective": 4}}}


@pytest.mark.parametrize(
    ("metrics", "metric", "score"),
    [
        ({"acc,none": 0.5, "acc_stderr,none": 0.1, "acc_norm,none": 0.75}, "acc_norm", 0.75),
        ({"acc,none": 0.5, "acc_stderr,none": 0.1}, "acc", 0.5),
        ({"exact_match,strict": 0.25, "exact_match,loose": 0.5}, "exact_match", 0.25),
        ({"word_perplexity,none": 12.0}, "word_perplexity", -12.0),
    ],
)
def test_which_score_counts(metrics: dict[str, float], metric: str, score: float) -> None:
    found = read_score(results(**metrics), "t")
    assert found is not None
    assert (found.metric, found.score, found.samples) == (metric, score, 4)
    assert found.metrics == {key: value for key, value in metrics.items() if "stderr" not in key}


def test_a_group_without_a_score_has_none() -> None:
    assert read_score(results(), "t") is None
    assert read_score(results(), "other") is None


def measured(after: str, **scores: float) -> dict[str, Any]:
    return {"after": after, "scores": {name: {"score": score} for name, score in scores.items()}}


def test_ability_and_forgetting() -> None:
    entries = [measured("untouched", a=0.5, b=0.9), measured("one", a=0.1, b=0.1), measured("three", a=0.4, b=0.6)]
    assert general_ability(entries, TASKS) == pytest.approx(0.5)
    assert general_forgetting(entries, TASKS) == pytest.approx(0.2)
    assert (general_ability(entries[:2], TASKS), general_forgetting(entries[:2], TASKS)) == (None, None)
    assert general_forgetting(entries[1:], TASKS) is None
    assert general_forgetting([], TASKS) is None


def test_a_missing_harness_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(general, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r"lm-evaluation-harness is not installed; install it \(pip install"):
        check_available(GeneralConfig(tasks=("hellaswag",)))


def test_a_missing_folder_is_told_at_once(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    with pytest.raises(BadInput, match=r"eval.general.include_path: .*absent is not a folder"):
        check_available(GeneralConfig(tasks=("a",), include_path=str(tmp_path / "absent")))


def test_tasks_that_cannot_be_used(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    folder = write_harness_tasks(tmp_path / "harness")
    config = {"tasks": ("run_it",), "include_path": str(folder)}
    with pytest.raises(
        BadInput, match=r"run_it executes code that the model has written, without a sandbox; .*confirm_unsafe"
    ):
        load_harness_tasks(GeneralConfig(**config))
    loaded = load_harness_tasks(GeneralConfig(**config, confirm_unsafe_code=True))
    assert set(loaded.loaded["run_it"]["tasks"]) == {"run_it"}
    group = load_harness_tasks(GeneralConfig(tasks=("both",), include_path=str(folder))).loaded["both"]
    assert set(group["tasks"]) == {"compass", "heading"}
    (folder / "compass.jsonl").unlink()
    with pytest.raises(BadInput, match=r"eval.general.tasks: compass cannot be loaded: .*compass.jsonl"):
        load_harness_tasks(GeneralConfig(tasks=("compass",), include_path=str(folder)))


@pytest.mark.slow
def test_names_that_the_harness_itself_has_or_has_not() -> None:
    """This reads the thousands of task files that come with the harness."""
    pytest.importorskip("lm_eval")
    with pytest.raises(BadInput, match=r"lm-evaluation-harness has no task 'helaswag'"):
        load_harness_tasks(GeneralConfig(tasks=("hellaswag", "helaswag")))
    with pytest.raises(BadInput, match=r"humaneval executes code that the model has written"):
        load_harness_tasks(GeneralConfig(tasks=("humaneval",)))
