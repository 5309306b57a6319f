"""Rank side of test_snapshot."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from cl_dist.engine.distributed import join
from cl_dist.engine.engine import TrainingEngine
from cl_dist.methods.protocol import TaskPlace
from cl_dist.state.integrity import CheckpointDamaged, StateUnusable
from cl_dist.state.snapshot import load_snapshot, save_snapshot
from tests.distributed.worlds import micro_batches, samples
from tests.faults.damage import DAMAGES
from tests.opens import opened
from tests.state.snapshot_jobs import build

FILES = [
    "state.json",
    "rank-00000.json",
    "rank-00000.safetensors",
    "rank-00001.json",
    "rank-00001.safetensors",
]


def every_damage(folder: str) -> dict[str, Any]:
    """Damage every file of a snapshot in every way and try to load it; finally, load the undamaged snapshot."""
    join(timeout_seconds=120)
    engine, _ = build(stage=2)
    engine.before_task(TaskPlace(0, "t", 2))
    good = Path(folder, "good")
    train(engine, 0)
    save_snapshot(good, engine.shards, {}, moments=True, extra=engine.method.tensors())
    saved = values(engine)
    train(engine, 1)
    moved = not same(saved, values(engine))
    attempts = [attempt(engine, good, Path(folder, "bad"), name, damage) for name in FILES for damage in DAMAGES]
    lacking = lacking_a_quantity(engine, good)
    with opened(good) as read:
        load_snapshot(good, engine.shards, engine.method.tensors())
    files = sorted(path.name for path in good.iterdir())
    restored = same(saved, values(engine))
    indexes = [name for name in read if name.endswith(".json")]
    return {
        "attempts": attempts,
        "moved": moved,
        "restored": restored,
        "files": files,
        "lacking": lacking,
        "indexes": indexes,
    }


def lacking_a_quantity(engine: TrainingEngine, good: Path) -> dict[str, Any]:
    """Load an intact snapshot that lacks a tensor that a method of another release needs."""
    name = engine.shards.names[0]
    wanted = engine.shards.master(name)
    before, message = values(engine), None
    try:
        load_snapshot(good, engine.shards, {"of another release": {name: wanted} if wanted is not None else {}})
    except StateUnusable as error:
        message = str(error)
    return {"message": message, "unchanged": same(before, values(engine))}


def attempt(engine: TrainingEngine, good: Path, bad: Path, name: str, damage: str) -> dict[str, Any]:
    """Load a copy of `good` whose file `name` is damaged."""
    first = torch.distributed.get_rank() == 0
    if first:
        shutil.copytree(good, bad)
        DAMAGES[damage](bad / name)
    torch.distributed.barrier()
    before, message = values(engine), None
    try:
        load_snapshot(bad, engine.shards, engine.method.tensors())
    except CheckpointDamaged as error:
        message = str(error)
    unchanged = same(before, values(engine))
    torch.distributed.barrier()
    if first:
        shutil.rmtree(bad)
    return {"file": name, "damage": damage, "message": message, "unchanged": unchanged}


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return all(torch.equal(*pair) for pair in zip(left, right, strict=True))


def values(engine: TrainingEngine) -> list[torch.Tensor]:
    """Copies of this rank's master weights and moments."""
    copies = []
    for name in engine.shards.names:
        master = engine.shards.master(name)
        if master is not None:
            copies += [shard.data.clone() for shard in (master, *engine.shards.moments(name).values())]
    return copies


def train(engine: TrainingEngine, step: int) -> None:
    rank, size = torch.distributed.get_rank(), 4 // torch.distributed.get_world_size()
    batch = samples("llama", 4)
    mine = micro_batches("llama", batch[rank * size : (rank + 1) * size], size)
    engine.train_step(step, mine, sum(sample.targets for sample in batch))
