"""Rank side of test_rebuild."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from cl_dist.config.schema import EvalConfig, ModelConfig, Recipe, StreamConfig, TaskConfig, TrainConfig, ZeroConfig
from cl_dist.engine import engine as engine_module
from cl_dist.engine.distributed import join
from cl_dist.engine.engine import TrainingEngine
from cl_dist.evaluation.inference import evaluating
from cl_dist.methods.composed import Composed
from cl_dist.methods.migu.config import MiguConfig
from cl_dist.methods.migu.method import Migu
from cl_dist.methods.protocol import TaskPlace
from cl_dist.models.load import LoadedModel
from cl_dist.sharding import gather_state_dict
from tests.distributed.worlds import OBJECTIVES, micro_batches, odd_model, samples

FROZEN = "layers.0."


def rebuild(stages: list[int], dtype: str) -> dict[str, dict[str, Any]]:
    """Per stage: train two steps, freeze the first block, rebuild, train two more; the weights' sums on the way."""
    join(timeout_seconds=120)
    return {str(stage): _one(stage, dtype) for stage in stages}


def _one(stage: int, dtype: str) -> dict[str, Any]:
    recipe = Recipe(
        model=ModelConfig(name_or_path="odd"),
        stream=StreamConfig(tasks=(TaskConfig(name="t", format="builtin"),)),
        train=TrainConfig(micro_batch_size=2, learning_rate=1e-2, eps=1e-2, dtype=dtype),  # type: ignore[arg-type]
        zero=ZeroConfig(stage=stage),  # type: ignore[arg-type]
        output_dir="unused",
    )
    model = odd_model("llama").to(getattr(torch, dtype))
    migu = Migu(MiguConfig(name="migu", first_task="masked"))
    engine = TrainingEngine(LoadedModel(model, None, OBJECTIVES["llama"]), recipe, Composed([migu]))  # type: ignore[arg-type]
    _train(engine, seed=0)
    _look(engine)
    before = gather_state_dict(engine.model)
    for name, param in engine.model.named_parameters():
        param.requires_grad_(FROZEN not in name)
    engine.rebuild()
    rebuilt = gather_state_dict(engine.model)
    _train(engine, seed=10, begin=False)  # an engine that is built anew within a task goes on masking
    after = gather_state_dict(engine.model)
    report = {
        "kept_by_rebuild": all(torch.equal(before[n], rebuilt[n]) for n in before),
        "frozen_moved": [n for n in before if FROZEN in n and not torch.equal(before[n], after[n])],
        "still": [n for n in before if FROZEN not in n and torch.equal(before[n], after[n])],
        "tracked": len(migu.keep),
        "dropped": sum(int((~keep).sum()) for keep in migu.keep.values()),
        "weights": {n: tensor.double().sum().item() for n, tensor in after.items()},
        "whole": _whole(engine),
    }
    engine.destroy()
    return report


def _whole(engine: TrainingEngine) -> dict[str, bool]:
    """Whether the engine holds its weights whole, by `eval.gather_weights`, and if there is no room on rank 1."""
    found, recipe = {}, engine.recipe
    for policy in ("auto", "always", "never") if recipe.zero.stage == 3 else ():
        engine.recipe = replace(recipe, eval=EvalConfig(gather_weights=policy))  # type: ignore[arg-type]
        with engine.whole() as whole:
            found[policy] = whole
    engine.recipe = recipe
    share = engine_module.GATHERED_SHARE
    try:
        engine_module.GATHERED_SHARE = -1.0 if torch.distributed.get_rank() == 1 else share
        with engine.whole() as whole:
            found["no room on rank 1"] = whole
    finally:
        engine_module.GATHERED_SHARE = share
    return found


def _look(engine: TrainingEngine) -> None:
    """As evaluation does between two tasks: stage 3 records another order of the modules."""
    with evaluating(engine.model):
        engine.model(**micro_batches("llama", samples("llama", 2, seed=7), 2)[0].inputs)
        engine.model(**micro_batches("llama", samples("llama", 2, seed=8), 2)[0].inputs)


def _train(engine: TrainingEngine, seed: int, begin: bool = True) -> None:
    rank = torch.distributed.get_rank()
    if begin:
        engine.before_task(TaskPlace(index=0, name="t", steps=2))
    for step in range(2):
        batch = samples("llama", 4, seed + step)
        mine = micro_batches("llama", batch[2 * rank : 2 * rank + 2], 2)
        engine.train_step(step, mine, sum(sample.targets for sample in batch))
