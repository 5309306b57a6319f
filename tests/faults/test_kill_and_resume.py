"""A run that is killed at any moment and resumed ends with the weights of an undisturbed one, bit for bit."""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.recipes import write_recipe
from tests.zygote import Zygote

STEPS = 8
EVERY = 3


def recipe(folder: Path, **changes: dict[str, Any]) -> Path:
    """Two tasks of eight steps, a checkpoint after every third, and dropout so that random numbers matter."""
    accumulation = changes.get("train", {}).get("gradient_accumulation", 1)
    sections: dict[str, dict[str, Any]] = {
        "model": {"lora": {"r": 4, "dropout": 0.1}},
        "stream": {"max_train_samples": 8 * STEPS * accumulation},
        "method": {"mask": "update"},
        "checkpoint": {"every_steps": EVERY},
    }
    for key, value in changes.items():
        sections[key] = {**sections.get(key, {}), **value}
    return write_recipe(folder, **sections)


@pytest.fixture(scope="module")
def undisturbed(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of an undisturbed run."""
    folder = tmp_path_factory.mktemp("undisturbed")
    outcome = zygote.run(["run", str(recipe(folder)), "--debug"], folder, world=2)
    assert outcome.codes == [0, 0], outcome.output
    return folder / "run"


def weights(run: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Every task's exported weights."""
    return {file.parts[-3]: load_file(file) for file in sorted(run.glob("tasks/*/model/*.safetensors"))}


def assert_same_end(run: Path, other: Path, tasks: Sequence[str] = ("01-spring", "02-summer")) -> None:
    """Require equal weights of all tasks, bit for bit, equal accuracy matrices, and the same samples in every step."""
    ours, theirs = weights(run), weights(other)
    assert ours.keys() == theirs.keys() == set(tasks)
    for task in ours:
        assert ours[task].keys() == theirs[task].keys()
        for name, tensor in ours[task].items():
            assert torch.equal(tensor, theirs[task][name]), f"{task}: {name} differs"
    records = [{path.parent.name: path.read_bytes() for path in run.glob("tasks/*/kept_rows*")} for run in (run, other)]
    assert records[0] == records[1]
    matrices = [json.loads((path / "metrics.json").read_text())["accuracy_matrix"] for path in (run, other)]
    assert matrices[0] == matrices[1]
    assert (run / "data_order.jsonl").read_text() == (other / "data_order.jsonl").read_text()


MOMENTS = [
    ("before the first step", "step", 0, 1),
    ("inside a task, past a checkpoint", "step", 1, 5),
    ("at the last step", "step", 0, STEPS),
    ("inside the second task", "step", 1, STEPS + 6),
    ("half of a checkpoint written", "tensor file", 1, 2),
    ("half of a task's end state written", "tensor file", 0, 3),
    ("a checkpoint written and not in its place", "publish", 0, 2),
    ("a checkpoint in its place and not in the manifest", "naming", 0, 2),
    ("a task's end state in its place", "rename", 0, 3),
    ("while evaluating", "evaluation", 0, 4),
    ("while the model is written", "export", 0, 1),
    ("between two tasks", "task", 0, 2),
]


@pytest.mark.parametrize(("moment", "on_rank", "count"), [m[1:] for m in MOMENTS], ids=[m[0] for m in MOMENTS])
def test_killed_and_resumed(
    zygote: Zygote, undisturbed: Path, tmp_path: Path, moment: str, on_rank: int, count: int
) -> None:
    path = recipe(tmp_path)
    fault = {"moment": moment, "on_rank": on_rank, "count": count}
    outcome = zygote.run(["run", str(path)], tmp_path, world=2, fault=fault)
    assert outcome.codes[on_rank] == -signal.SIGKILL, "the moment never came"
    assert not (tmp_path / "run" / "metrics.json").exists()
    outcome = zygote.run(["run", str(path), "--resume", "--debug"], tmp_path, world=2)
    assert outcome.codes == [0, 0], outcome.output
    assert_same_end(tmp_path / "run", undisturbed)


def test_killed_again_and_again(zygote: Zygote, undisturbed: Path, tmp_path: Path) -> None:
    path, restarts = recipe(tmp_path), 0
    while True:
        argv = ["run", str(path), *(["--resume"] if restarts else [])]
        fault = {"moment": "step", "on_rank": restarts % 2, "count": EVERY + 2}
        outcome = zygote.run(argv, tmp_path, world=2, fault=fault)
        if outcome.codes == [0, 0]:
            break
        restarts += 1
        assert restarts < 12, outcome.output
    assert restarts >= 4
    assert_same_end(tmp_path / "run", undisturbed)


def test_a_stray_newer_checkpoint_does_not_cost_the_one_that_is_named(
    zygote: Zygote, undisturbed: Path, tmp_path: Path
) -> None:
    """Killed before checkpoint 6 was in the manifest, resumed, and asked to stop at an earlier step."""
    path = recipe(tmp_path)
    before_naming_6 = {"moment": "naming", "on_rank": 0, "count": 2}
    zygote.run(["run", str(path)], tmp_path, world=2, fault=before_naming_6)
    assert (tmp_path / "run" / "checkpoint" / "task-01-step-000006").is_dir()
    stop_after_step_5 = {"moment": "stop", "on_rank": 1, "count": 2}
    outcome = zygote.run(["run", str(path), "--resume"], tmp_path, world=2, fault=stop_after_step_5)
    assert outcome.codes == [75, 75], outcome.output
    outcome = zygote.run(["run", str(path), "--resume", "--debug"], tmp_path, world=2)
    assert outcome.codes == [0, 0], outcome.output
    assert_same_end(tmp_path / "run", undisturbed)


def evaluations(run: Path) -> list[tuple[str, str]]:
    """Model and task of every evaluation in the log."""
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [(record["folder"], record["task"]) for record in records if record["event"] == "evaluation"]


@pytest.mark.parametrize("count", [2, 4], ids=["of the untouched model", "of a trained one"])
def test_what_is_scored_is_not_scored_again(zygote: Zygote, undisturbed: Path, tmp_path: Path, count: int) -> None:
    """Killed after the second task's evaluation and before its predictions are written."""
    path = recipe(tmp_path)
    zygote.run(["run", str(path)], tmp_path, world=2, fault={"moment": "evaluation", "on_rank": 0, "count": count})
    assert len(evaluations(tmp_path / "run")) == count - 1
    outcome = zygote.run(["run", str(path), "--resume", "--debug"], tmp_path, world=2)
    assert outcome.codes == [0, 0], outcome.output
    assert evaluations(tmp_path / "run") == evaluations(undisturbed)
    assert_same_end(tmp_path / "run", undisturbed)


def test_asked_to_stop_inside_an_evaluation(zygote: Zygote, tmp_path: Path) -> None:
    """It stops between two batches rather than after the task's last one, because the job's time is over."""
    stream = {"max_train_samples": 8, "max_eval_samples": 40}
    path = recipe(tmp_path, stream=stream, eval={"batch_size": 1, "before_training": False})
    stop = {"moment": "stop in evaluation", "on_rank": 1, "count": 2}
    outcome = zygote.run(["run", str(path)], tmp_path, world=2, fault=stop)
    assert outcome.codes == [75, 75], outcome.output
    assert "stopped during evaluation; the state is saved, continue with --resume" in outcome.output[0]
    assert evaluations(tmp_path / "run") == []
    outcome = zygote.run(["run", str(path), "--resume", "--debug"], tmp_path, world=2)
    assert outcome.codes == [0, 0], outcome.output
    models = ("01-spring", "02-summer")
    assert evaluations(tmp_path / "run") == [(model, task) for model in models for task in ("spring", "summer")]


def test_resuming_a_finished_run_changes_nothing(zygote: Zygote, undisturbed: Path, tmp_path: Path) -> None:
    before = (undisturbed / "metrics.json").read_text()
    path = undisturbed.parent / "recipe.yaml"
    outcome = zygote.run(["run", str(path), "--resume"], tmp_path, world=2)
    assert outcome.codes == [0, 0]
    assert "already finished" in outcome.output[0]
    assert (
        json.loads(before)["accuracy_matrix"]
        == json.loads((undisturbed / "metrics.json").read_text())["accuracy_matrix"]
    )


CONFIGURATIONS = [
    {"zero": {"stage": 0}},
    {"zero": {"stage": 1, "offload": True}, "train": {"gradient_accumulation": 2}},
    {"zero": {"stage": 3}, "train": {"dtype": "bfloat16", "activation_checkpointing": True}},
    {"zero": {"stage": 0}, "train": {"dtype": "bfloat16"}, "method": {"selection": "random", "first_task": "masked"}},
    {"zero": {"stage": 2}, "train": {"keep_optimizer": True, "dtype": "bfloat16"}, "model": {"lora": None}},
]


NAMES = ("zero0", "zero1-offload", "zero3-bf16", "zero0-bf16", "keep")


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(changes, id=name, marks=() if name == "zero3-bf16" else pytest.mark.slow)
        for name, changes in zip(NAMES, CONFIGURATIONS, strict=True)
    ],
)
def test_at_other_stages_and_in_bfloat16(zygote: Zygote, tmp_path: Path, changes: dict[str, Any]) -> None:
    """Also bit for bit: new processes round the same way in bfloat16, and the state has the float32 master weights."""
    runs = []
    for name, fault in (("undisturbed", None), ("killed", {"moment": "step", "on_rank": 1, "count": 13})):
        folder = tmp_path / name
        folder.mkdir()
        argv = ["run", str(recipe(folder, **changes)), "--debug"]
        outcome = zygote.run(argv, folder, world=2, fault=fault)
        if fault is not None:
            assert outcome.codes[1] == -signal.SIGKILL
            outcome = zygote.run([*argv, "--resume"], folder, world=2)
        assert outcome.codes == [0, 0], "\n".join(outcome.output)
        runs.append(folder / "run")
    assert_same_end(runs[1], runs[0])
