"""Rank side of test_snapshot: a method's own tensors beside weights and moments."""

from __future__ import annotations

from pathlib import Path

import torch

from cl_dist.config.schema import ModelConfig, Recipe, StreamConfig, TaskConfig, TrainConfig, ZeroConfig
from cl_dist.engine.distributed import join
from cl_dist.engine.engine import TrainingEngine
from cl_dist.methods.composed import Composed
from cl_dist.methods.protocol import Method, TaskPlace
from cl_dist.models.load import LoadedModel
from cl_dist.sharding import Shard, ShardView
from cl_dist.state.integrity import StateUnusable
from cl_dist.state.snapshot import load_snapshot, save_snapshot
from tests.distributed.worlds import OBJECTIVES, micro_batches, odd_model, samples, whole


class Marks(Method):
    """Keeps one number per element on this rank: three times its position in the parameter."""

    def attach(self, model: torch.nn.Module, shards: ShardView, train: TrainConfig) -> None:
        self.held: dict[str, Shard] = {}
        for name in shards.names:
            master = shards.master(name)
            if master is not None:
                self.held[name] = Shard(master.start, torch.zeros(master.data.numel()))

    def tensors(self) -> dict[str, dict[str, Shard]]:
        return {"marks": self.held}


def build(stage: int) -> tuple[TrainingEngine, Marks]:
    recipe = Recipe(
        model=ModelConfig(name_or_path="odd"),
        stream=StreamConfig(tasks=(TaskConfig(name="t", format="builtin"),)),
        train=TrainConfig(micro_batch_size=2, learning_rate=1e-2, eps=1e-2),
        zero=ZeroConfig(stage=stage),  # type: ignore[arg-type]
        output_dir="unused",
    )
    marks = Marks()
    return TrainingEngine(LoadedModel(odd_model("llama"), None, OBJECTIVES["llama"]), recipe, Composed([marks])), marks  # type: ignore[arg-type]


def save(folder: str, stage: int) -> dict[str, float]:
    """Train a step, set the marks, save; return the sums of what was saved."""
    join(timeout_seconds=120)
    engine, marks = build(stage)
    engine.before_task(TaskPlace(0, "t", 1))
    rank, size = torch.distributed.get_rank(), 4 // torch.distributed.get_world_size()
    batch = samples("llama", 4)
    mine = micro_batches("llama", batch[rank * size : (rank + 1) * size], size)
    engine.train_step(0, mine, sum(sample.targets for sample in batch))
    for shard in marks.held.values():
        shard.data.copy_(3.0 * torch.arange(shard.start, shard.stop))
    save_snapshot(Path(folder), engine.shards, {"here": 1}, moments=True, extra=engine.method.tensors())
    return _sums(engine)


def load(folder: str, stage: int) -> dict[str, float]:
    """Load into a fresh engine of any stage; return the sums and the number of wrong marks."""
    join(timeout_seconds=120)
    engine, marks = build(stage)
    # Quantities that an older release did not know keep their values; those that it must have stored are missed.
    held = engine.method.tensors()
    new = {"later": {"x": Shard(0, torch.full((3,), 7.0))}}
    try:
        load_snapshot(Path(folder), engine.shards, held | new)
        missed = ""
    except StateUnusable as error:
        missed = str(error)
    state = load_snapshot(Path(folder), engine.shards, held | new, later=frozenset(("later", "method0.marks")))
    assert new["later"]["x"].data.tolist() == [7.0] * 3
    wrong = sum(int((shard.data != 3.0 * torch.arange(shard.start, shard.stop)).sum()) for shard in marks.held.values())
    found = {"wrong": wrong, "here": state["here"], "step": engine.shards.optimizer_step}
    return {**_sums(engine), **found, "missed": "later of x is not stored" in missed}


def _sums(engine: TrainingEngine) -> dict[str, float]:
    quantities = ("master", "exp_avg", "exp_avg_sq")
    return {q: sum(t.double().sum().item() for t in whole(engine.shards, q).values()) for q in quantities}
