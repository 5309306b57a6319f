"""Methods that change what is trained or where a task starts, killed and resumed, end like an undisturbed run."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.faults.damage import DAMAGES
from tests.faults.test_kill_and_resume import assert_same_end, weights
from tests.recipes import write_recipe
from tests.zygote import Zygote

STEPS = 4
EVERY = 3


def recipe(folder: Path, **changes: dict[str, Any]) -> Path:
    """A classifier, whose head is trained beside adapters; two tasks of four steps, a checkpoint after the third."""
    sections: dict[str, Any] = {
        "model": {"name_or_path": "builtin:roberta-tiny", "lora": {"r": 3, "dropout": 0.1}},
        "stream": {"max_train_samples": 8 * STEPS, "max_eval_samples": 4},
        "method": {"name": "olora"},
        "checkpoint": {"every_steps": EVERY},
        "eval": {"before_training": False},
    }
    for key, value in changes.items():
        sections[key] = {**sections.get(key, {}), **value}
    return write_recipe(folder, **sections)


@pytest.fixture(scope="module")
def undisturbed(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    outcome = zygote.run(["run", str(recipe(folder)), "--debug"], folder, world=2)
    assert outcome.codes == [0, 0], outcome.output
    return folder / "run"


def killed(zygote: Zygote, path: Path, moment: str, count: int) -> Path:
    """Run folder of a run of which rank 1 was killed, or rank 0 where it alone comes to the moment."""
    on_rank = 0 if moment == "evaluation" else 1
    fault = {"moment": moment, "on_rank": on_rank, "count": count}
    outcome = zygote.run(["run", str(path)], path.parent, world=2, fault=fault)
    assert outcome.codes[on_rank] == -signal.SIGKILL, "the moment never came"
    return path.parent / "run"


def resumed(zygote: Zygote, path: Path) -> str:
    """The output of rank 0."""
    outcome = zygote.run(["run", str(path), "--resume", "--debug"], path.parent, world=2)
    assert outcome.codes == [0, 0], "\n".join(outcome.output)
    return outcome.output[0]


def test_inside_the_second_task(zygote: Zygote, undisturbed: Path, tmp_path: Path) -> None:
    """The old adapter is a part of the checkpoint."""
    path = recipe(tmp_path)
    run = killed(zygote, path, "step", 2 * STEPS)
    assert f"resuming task summer after step {EVERY} of {STEPS}" in resumed(zygote, path)
    assert_same_end(run, undisturbed)


def test_at_the_start_of_the_second_task(zygote: Zygote, undisturbed: Path, tmp_path: Path) -> None:
    """The state before has no old adapter, and a trained one that becomes an old one."""
    path = recipe(tmp_path)
    run = killed(zygote, path, "step", STEPS + 2)
    assert json.loads((run / "manifest.json").read_text())["completed"] == 1
    resumed(zygote, path)
    assert_same_end(run, undisturbed)


def test_with_a_damaged_checkpoint_the_second_task_begins_anew(
    zygote: Zygote, undisturbed: Path, tmp_path: Path
) -> None:
    """The model, which was prepared for the checkpoint, goes back to the state before."""
    path = recipe(tmp_path)
    run = killed(zygote, path, "step", 2 * STEPS)
    DAMAGES["deleted"](run / "checkpoint" / f"task-02-step-{EVERY:06}" / "rank-00001.json")
    assert "no saved state inside task summer is intact: training it from the start\n" in resumed(zygote, path)
    assert_same_end(run, undisturbed)


OTHERS: dict[str, tuple[dict[str, Any], str, int]] = {
    "zero0": ({"zero": {"stage": 0}}, "step", 2 * STEPS),
    "zero1-offload-inclora": (
        {"zero": {"stage": 1, "offload": True}, "method": {"name": "inclora"}},
        "step",
        2 * STEPS,
    ),
    "zero3-bf16": ({"zero": {"stage": 3}, "train": {"dtype": "bfloat16"}}, "step", 2 * STEPS),
    "zero2-bf16-start": ({"train": {"dtype": "bfloat16"}}, "step", STEPS + 1),
    "evaluation": ({}, "evaluation", 3),
    "per_task": ({"method": {"name": "per_task"}, "zero": {"stage": 3}}, "step", 2 * STEPS),
    "per_task-start": ({"method": {"name": "per_task"}, "model": {"lora": None}}, "step", STEPS + 1),
    "replay": ({"method": {"name": "replay", "policy": "reservoir", "memory_size": 9}}, "step", 2 * STEPS),
}
FAST = ("zero3-bf16",)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in OTHERS]
)
def test_elsewhere(zygote: Zygote, tmp_path: Path, name: str) -> None:
    changes, moment, count = OTHERS[name]
    runs = []
    for kind in ("undisturbed", "killed"):
        (tmp_path / kind).mkdir()
        path = recipe(tmp_path / kind, **changes)
        if kind == "killed":
            killed(zygote, path, moment, count)
            resumed(zygote, path)
        else:
            outcome = zygote.run(["run", str(path), "--debug"], path.parent, world=2)
            assert outcome.codes == [0, 0], "\n".join(outcome.output)
        runs.append(path.parent / "run")
    assert_same_end(runs[1], runs[0])


@pytest.mark.slow
def test_multi_task_goes_on_after_its_only_stage(zygote: Zygote, tmp_path: Path) -> None:
    """Killed inside the stage, and between it and the tasks that have no steps."""
    runs = []
    for kind, fault in (("undisturbed", None), ("inside", ("step", 1, 2 * STEPS)), ("after", ("task", 0, 2))):
        (tmp_path / kind).mkdir()
        path = recipe(tmp_path / kind, method={"name": "multi_task"})
        argv = ["run", str(path), "--debug"]
        armed = None if fault is None else dict(zip(("moment", "on_rank", "count"), fault, strict=True))
        outcome = zygote.run(argv, path.parent, world=2, fault=armed)
        if fault is not None:
            assert outcome.codes[fault[1]] == -signal.SIGKILL, outcome.output
            resumed(zygote, path)
        runs.append(path.parent / "run")
    for run in runs[1:]:
        ours, theirs = (json.loads((each / "metrics.json").read_text()) for each in (run, runs[0]))
        assert ours["accuracy_matrix"] == theirs["accuracy_matrix"]
        assert [entry["steps"] for entry in ours["timings"]] == [2 * STEPS, 0]
        (mine,), (other,) = weights(run).values(), weights(runs[0]).values()
        assert all((tensor == other[name]).all() for name, tensor in mine.items())
