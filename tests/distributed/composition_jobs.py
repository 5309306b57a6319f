"""Rank side of test_composition: MIGU and KIF in one engine."""

from __future__ import annotations

from typing import Any

import torch

from cl_dist.config.schema import ModelConfig, Recipe, StreamConfig, TaskConfig, TrainConfig, ZeroConfig
from cl_dist.engine.distributed import join
from cl_dist.engine.engine import TrainingEngine
from cl_dist.methods.composed import Composed
from cl_dist.methods.kif.config import KifConfig
from cl_dist.methods.kif.method import Kif
from cl_dist.methods.migu.config import MiguConfig
from cl_dist.methods.migu.method import Migu
from cl_dist.methods.protocol import TaskPlace
from cl_dist.models.load import LoadedModel
from cl_dist.models.tracked import tracked_linears
from tests.distributed.worlds import micro_batches, odd_model, samples, together, whole

STEPS = 3
BATCH = 4


def train(stage: int, order: list[str], skip_rows: bool) -> dict[str, Any]:
    """One masked task under MIGU and KIF in the given order; what importance came to, and where."""
    world, rank = join(timeout_seconds=120)[1], torch.distributed.get_rank()
    size = BATCH // world
    recipe = Recipe(
        model=ModelConfig(name_or_path="odd"),
        stream=StreamConfig(tasks=(TaskConfig(name="t", format="builtin"),)),
        train=TrainConfig(micro_batch_size=size, learning_rate=1e-2, eps=1e-2),
        zero=ZeroConfig(stage=stage),  # type: ignore[arg-type]
        output_dir="unused",
    )
    kif = Kif(KifConfig(name="kif", units="row"))
    migu = Migu(MiguConfig(name="migu", first_task="masked", skip_rows=skip_rows))
    methods = {"migu": migu, "kif": kif}
    model = odd_model("llama")
    layers = [f"{name}.weight" for name in tracked_linears(model, "blocks")]
    engine = TrainingEngine(LoadedModel(model, None, "causal_lm"), recipe, Composed([methods[name] for name in order]))  # type: ignore[arg-type]
    engine.before_task(TaskPlace(0, "t", STEPS))
    for step in range(STEPS):
        batch = samples("llama", BATCH, seed=step)
        mine = micro_batches("llama", batch[rank * size : (rank + 1) * size], size)
        engine.train_step(step, mine, sum(sample.targets for sample in batch))
    smoothed = together(kif.tensors()["smoothed"], engine.shards)
    masters = whole(engine.shards, "master")
    engine.destroy()
    return {
        "untouched_rows": {name: int((smoothed[name] == 0).all(dim=1).sum()) for name in layers},
        "rows": {name: smoothed[name].shape[0] for name in layers},
        "smoothed": torch.cat([smoothed[name].reshape(-1) for name in layers]).tolist(),
        "weights": torch.cat([tensor.reshape(-1) for tensor in masters.values()]).tolist(),
    }
