"""KIF killed during fusion or while it writes its state or results, and resumed, ends like an undisturbed run."""

from __future__ import annotations

import csv
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cl_dist.report.write import write_report
from tests.faults.test_kill_and_resume import assert_same_end
from tests.recipes import write_recipe
from tests.zygote import Zygote

STEPS = 4
EVERY = 3
TASKS = ("01-spring", "02-summer")


def recipe(folder: Path, **changes: dict[str, Any]) -> Path:
    """Two tasks of four steps, a checkpoint after the third."""
    sections: dict[str, Any] = {
        "model": {"lora": {"r": 3, "dropout": 0.1}},
        "stream": {"max_train_samples": 8 * STEPS},
        "method": {"name": "kif", "keep_unfused": True},
        "checkpoint": {"every_steps": EVERY},
    }
    for key, value in changes.items():
        sections[key] = {**sections.get(key, {}), **value}
    return write_recipe(folder, **sections)


@pytest.fixture(scope="module")
def undisturbed(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    outcome = zygote.run(["run", str(recipe(folder)), "--debug"], folder, world=2)
    assert outcome.codes == [0, 0], outcome.output
    assert "kif: " in outcome.output[0]
    assert "8 for each of its" in outcome.output[0]
    return folder / "run"


def tensors(run: Path, pattern: str) -> dict[str, torch.Tensor]:
    """Every tensor of the files that match, by file and name."""
    return {
        f"{file.relative_to(run)}:{name}": tensor
        for file in sorted(run.glob(pattern))
        for name, tensor in load_file(file).items()
    }


def assert_same_results(run: Path, other: Path) -> None:
    """Scores, units and unfused weights are also equal, bit for bit."""
    assert_same_end(run, other)
    for pattern in ("tasks/*/unit_scores.safetensors", "tasks/*/unfused/*.safetensors"):
        ours, theirs = tensors(run, pattern), tensors(other, pattern)
        assert ours.keys() == theirs.keys()
        assert {name.split("/")[1] for name in ours} == set(TASKS)
        assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    for task in TASKS:
        assert (run / "tasks" / task / "units.json").read_text() == (other / "tasks" / task / "units.json").read_text()


MOMENTS = [
    ("half of the parameters fused", "fusion", 1, 3),
    ("before the second task's end state is in its place", "publish", 0, 7),
    ("half of the second task's end state written", "tensor file", 1, 4),
    ("a checkpoint with importance, and past it", "step", 0, 2 * STEPS),
    ("while the unfused model is written", "export", 0, 3),
    ("while the fused model is written", "export", 0, 4),
    ("between units and scores", "results", 0, 2),
]


@pytest.mark.parametrize(("moment", "on_rank", "count"), [m[1:] for m in MOMENTS], ids=[m[0] for m in MOMENTS])
def test_killed_and_resumed(
    zygote: Zygote, undisturbed: Path, tmp_path: Path, moment: str, on_rank: int, count: int
) -> None:
    path = recipe(tmp_path)
    fault = {"moment": moment, "on_rank": on_rank, "count": count}
    outcome = zygote.run(["run", str(path)], tmp_path, world=2, fault=fault)
    assert outcome.codes[on_rank] == -signal.SIGKILL, "the moment never came"
    assert len(json.loads((tmp_path / "run" / "manifest.json").read_text())["accuracy_matrix"]) == 2
    outcome = zygote.run(["run", str(path), "--resume", "--debug"], tmp_path, world=2)
    assert outcome.codes == [0, 0], outcome.output
    assert_same_results(tmp_path / "run", undisturbed)


RECURRENT = {"name": "recurrent_kif", "inner_steps": 2, "outer_steps": 1, "replay_ratio": 0.25}
AS_PUBLISHED = {
    "importance_at": "after_update", "empty_inner_scores": True, "schedule_over": "inner_steps",
    "outer_loss_weight": 0.25, "by_task": {"summer": {"weight_neither": 0.4, "beta1": 0.5}},
}  # fmt: skip
LATE = {
    "importance_at": "after_update",
    "importance_from_step": 2,
    "by_task": {"summer": {"tau": 0.5, "order": "first"}},
}
"""Two cycles of three steps; the last checkpoint before the second fusion is after the second cycle's first step."""

CONFIGURATIONS: dict[str, tuple[dict[str, Any], int, int]] = {
    "zero0-bf16-row": (
        {"zero": {"stage": 0}, "train": {"dtype": "bfloat16"}, "model": {"lora": None}, "method": {"units": "row"}},
        STEPS,
        2,
    ),
    "zero3-keep-replay": (
        {"zero": {"stage": 3}, "train": {"keep_optimizer": True}, "method": {"replay_ratio": 0.25, **LATE}},
        STEPS + 1,
        2,
    ),
    "zero1-offload-tasl": ({"zero": {"stage": 1, "offload": True}, "method": {"name": "tasl"}}, STEPS, 2),
    "zero2-recurrent": ({"method": RECURRENT, "checkpoint": {"every_steps": 4}}, STEPS + 2, 70),
    "zero2-recurrent-as-published": (
        {"method": {**RECURRENT, **AS_PUBLISHED}, "checkpoint": {"every_steps": 4}, "train": {"schedule": "linear"}},
        STEPS + 2,
        70,
    ),
}
"""What is changed, the second task's steps, and which call of the fusion's arithmetic is the last one."""


FAST = ("zero3-keep-replay",)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in CONFIGURATIONS]
)
def test_at_other_stages(zygote: Zygote, tmp_path: Path, name: str) -> None:
    changes, second_task, count = CONFIGURATIONS[name]
    runs = []
    for name, fault in (("undisturbed", None), ("killed", {"moment": "fusion", "on_rank": 1, "count": count})):
        folder = tmp_path / name
        folder.mkdir()
        argv = ["run", str(recipe(folder, **changes)), "--debug"]
        outcome = zygote.run(argv, folder, world=2, fault=fault)
        if fault is not None:
            assert outcome.codes[1] == -signal.SIGKILL
            outcome = zygote.run([*argv, "--resume"], folder, world=2)
        assert outcome.codes == [0, 0], "\n".join(outcome.output)
        runs.append(folder / "run")
    steps = [entry["steps"] for entry in json.loads((runs[0] / "metrics.json").read_text())["timings"]]
    assert steps == [STEPS, second_task]
    assert_same_results(runs[1], runs[0])


def test_a_report_can_be_made_of_what_is_kept(undisturbed: Path, tmp_path: Path) -> None:
    report = write_report(undisturbed, tmp_path / "report")
    assert (len(report.files), report.missing) == (12, ())
    scores = load_file(undisturbed / "tasks" / TASKS[1] / "unit_scores.safetensors")
    with (tmp_path / "report" / "fusion.csv").open() as file:
        shares = [row for row in csv.DictReader(file) if row["task"] == "summer"]
    # The ranks of a module have the same size and are consecutive.
    expected = scores["share_new"].reshape(len(shares), -1)
    assert [float(row["new_mean"]) for row in shares] == pytest.approx(expected.mean(1).tolist())
    assert [float(row["new_max"]) for row in shares] == expected.amax(1).tolist()


def test_fusion_can_be_recomputed_from_what_is_kept(undisturbed: Path) -> None:
    """The exported model is share * unfused + (1 - share) * the model before, unit by unit of units.json."""
    first, second = (undisturbed / "tasks" / task for task in TASKS)
    scores = load_file(second / "unit_scores.safetensors")
    units = json.loads((second / "units.json").read_text())
    before, new, fused = (
        load_file(file / "adapter_model.safetensors")
        for file in (first / "model", second / "unfused", second / "model")
    )
    moved = 0
    for share, slices in zip(scores["share_new"].tolist(), units.values(), strict=True):
        for entry in slices:
            name = entry["parameter"].replace(".default", "")  # peft omits the adapter's name
            box = tuple(slice(start, stop) for start, stop in entry["slices"])
            assert torch.allclose(fused[name][box], share * new[name][box] + (1 - share) * before[name][box], atol=1e-7)
            moved += int(not torch.equal(fused[name][box], new[name][box]))
    assert moved > 0
    past = load_file(first / "unit_scores.safetensors")["accumulated_normalised"]
    assert torch.allclose(scores["share_new"], torch.sigmoid((scores["current_normalised"] - past) / 0.25))
    assert torch.equal(load_file(first / "unit_scores.safetensors")["share_new"], torch.ones(len(units)).double())
    for name, tensor in load_file(first / "unfused" / "adapter_model.safetensors").items():
        assert torch.equal(tensor, before[name]), "the first task was fused"
