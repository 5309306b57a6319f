"""Rank side of test_state: KIF's state written by some ranks and read by others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from cl_dist.config.schema import LoraConfig, ModelConfig, Recipe, StreamConfig, TaskConfig, TrainConfig, ZeroConfig
from cl_dist.engine.distributed import join
from cl_dist.engine.engine import TrainingEngine
from cl_dist.methods.composed import Composed
from cl_dist.methods.kif.config import KifConfig
from cl_dist.methods.kif.method import Kif
from cl_dist.methods.protocol import TaskPlace
from cl_dist.models.load import LoadedModel
from cl_dist.models.lora import add_lora
from cl_dist.state.snapshot import load_snapshot, save_snapshot
from tests.distributed.kif_jobs import together
from tests.distributed.worlds import OBJECTIVES, micro_batches, odd_model, samples, whole

STEPS = 2
BATCH = 4


def save(folder: str, stage: int, units: str) -> dict[str, Any]:
    """Train a task and one step of the next, save, then finish that task."""
    engine, kif = _engine(stage, units)
    _start(engine, 0)
    for step in range(STEPS):
        _step(engine, 0, step)
    engine.method.after_task(TaskPlace(0, "t", STEPS))
    engine.shards.reset_optimizer()
    _start(engine, 1)
    _step(engine, 1, 0)
    save_snapshot(Path(folder), engine.shards, {}, moments=True, extra=engine.method.tensors())
    return {"state": _state(engine, kif), **_finish(engine, kif)}


def load(folder: str, stage: int, units: str) -> dict[str, Any]:
    """Load into a fresh engine and finish the task."""
    engine, kif = _engine(stage, units)
    load_snapshot(Path(folder), engine.shards, engine.method.tensors())
    _start(engine, 1)
    return {"state": _state(engine, kif), **_finish(engine, kif)}


def _engine(stage: int, units: str) -> tuple[TrainingEngine, Kif]:
    join(timeout_seconds=120)
    torch.manual_seed(0)
    recipe = Recipe(
        model=ModelConfig(name_or_path="odd"),
        stream=StreamConfig(tasks=(TaskConfig(name="t", format="builtin"),)),
        train=TrainConfig(
            micro_batch_size=BATCH // torch.distributed.get_world_size(), learning_rate=1e-2, eps=1e-2
        ),
        zero=ZeroConfig(stage=stage),  # type: ignore[arg-type]
        output_dir="unused",
    )  # fmt: skip
    kif = Kif(KifConfig(name="kif", units=units))  # type: ignore[arg-type]
    model: Any = odd_model("llama")
    if units == "rank":
        model = add_lora(model, LoraConfig(r=3, alpha=3.0), "causal_lm", seed=1)
    return TrainingEngine(LoadedModel(model, None, OBJECTIVES["llama"]), recipe, Composed([kif])), kif  # type: ignore[arg-type]


def _start(engine: TrainingEngine, index: int) -> None:
    engine.before_task(TaskPlace(index, "t", STEPS))


def _step(engine: TrainingEngine, task: int, step: int) -> None:
    rank, size = torch.distributed.get_rank(), BATCH // torch.distributed.get_world_size()
    batch = samples("llama", BATCH, seed=10 * task + step)
    mine = micro_batches("llama", batch[rank * size : (rank + 1) * size], size)
    engine.train_step(step, mine, sum(sample.targets for sample in batch))


def _state(engine: TrainingEngine, kif: Kif) -> dict[str, list[float]]:
    """All elements of KIF's sharded state, and the scores."""
    kept = {q: together(kif.tensors()[q], engine.shards) for q in ("smoothed", "uncertainty", "fused")}
    flat = {q: torch.cat([t.reshape(-1) for t in tensors.values()]).tolist() for q, tensors in kept.items()}
    return flat | {name: tensor.tolist() for name, tensor in kif.scores.tensors().items()}


def _finish(engine: TrainingEngine, kif: Kif) -> dict[str, Any]:
    _step(engine, 1, 1)
    engine.method.after_task(TaskPlace(1, "t", STEPS))
    weights = torch.cat([t.reshape(-1) for t in whole(engine.shards, "master").values()])
    share = kif.scores.share_new.tolist()
    engine.destroy()
    return {"weights": weights.tolist(), "share": share}
