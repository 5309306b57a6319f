"""Small run folders, written by the code that writes those of real runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from cl_dist.config.load import dump_recipe, load_recipe
from cl_dist.methods.kif.config import KifConfig
from cl_dist.methods.kif.fusion import UnitScores
from cl_dist.methods.kif.unit_method import write_scores
from cl_dist.methods.kif.units import UnitMap, Units
from cl_dist.state.ledger import Ledger
from cl_dist.state.manifest import Manifest
from cl_dist.state.run_folder import RunFolder

SCORING: dict[str, dict[str, str | int]] = {
    "yelp": {"metric": "rouge_l", "scored_on": "train"},
    "amazon": {"metric": "exact_match", "scored_on": "test"},
}
"""How two of the tasks were scored, if a run has them."""
TIMING = {"train_seconds": 2.0, "steps": 3, "tokens": 600, "evaluate_seconds": 0.5}


def write_run(
    path: Path, tasks: Sequence[str], done: int, losses: Sequence[float | None] = (3.0, 2.0, 1.0)
) -> RunFolder:
    """A run that has trained `done` of its tasks, each with the given losses; scores ascend through the matrix."""
    path.mkdir(parents=True)
    folder = RunFolder(path)
    count = len(tasks)
    rows = tuple(tuple((i * count + j) / (count * count + count) for j in range(count)) for i in range(done + 1))
    manifest = Manifest(
        tasks=tuple(tasks),
        world_size=2,
        zero_stage=2,
        status="finished" if done == len(tasks) else "interrupted",
        completed=done,
        accuracy_matrix=rows,
        scoring=SCORING,
        peak_memory_bytes=(512 << 20, 256 << 20),
        timings=(TIMING,) * done,
    )
    ledger = Ledger(folder, manifest, writer=True)
    ledger.start(dump_recipe(load_recipe("quickstart", ["method.name=kif"])[0]))
    for name in tasks[:done]:
        for step, loss in enumerate(losses, start=1):
            ledger.log(event="step", task=name, step=step, loss=loss, seconds=0.1)
        ledger.log(event="evaluation", folder="x", task=name, score=0.5, mode="generate", metric="rouge_l", samples=4)
    return folder


def write_units(
    folder: RunFolder,
    shapes: Mapping[str, tuple[int, ...]],
    units: Units,
    scores: Sequence[torch.Tensor],
    **config: Any,
) -> UnitMap:
    """Let KIF's own code score and fuse the tasks of a run, and write the results; `scores` has one vector per task."""
    manifest, unit_map = Manifest.read(folder.manifest), UnitMap.build(shapes, units)
    state = UnitScores(len(unit_map), KifConfig(name="kif", **config))
    for position, vector in enumerate(scores):
        state.take(vector.double(), first=position == 0)
        write_scores(folder.task(position, manifest.tasks[position]).path, unit_map, state.tensors())
    return unit_map


def llama_lora(layers: int, rank: int, width: int = 8) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the LoRA matrices of a Llama."""
    shapes = {}
    kinds = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    for layer in range(layers):
        for kind in kinds:
            module = f"base_model.model.model.layers.{layer}.{kind}"
            shapes[f"{module}.lora_A.default.weight"] = (rank, width)
            shapes[f"{module}.lora_B.default.weight"] = (width, rank)
    return shapes
