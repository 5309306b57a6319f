"""Whole optimiser steps under DeepSpeed, with and without a method, on a Llama with random weights."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from cl_dist.benchmarks.harness import Contestant, Times, WallClock, race
from cl_dist.benchmarks.ranks import TIMEOUT_SECONDS
from cl_dist.benchmarks.training import StepSize, build_model, token_ids
from cl_dist.config.schema import ModelConfig, Recipe, StreamConfig, TaskConfig, TrainConfig, ZeroConfig
from cl_dist.engine.device import device
from cl_dist.engine.distributed import join
from cl_dist.engine.engine import TrainingEngine
from cl_dist.launch.environment import rank_environment
from cl_dist.launch.rendezvous import find_free_port
from cl_dist.methods.composed import compose
from cl_dist.methods.config import MethodConfig
from cl_dist.methods.kif.config import KifConfig
from cl_dist.methods.migu.config import MiguConfig
from cl_dist.methods.protocol import Method, TaskPlace
from cl_dist.models.load import LoadedModel
from cl_dist.tasks.collate import Batch, collate
from cl_dist.tasks.types import Encoded

METHODS: dict[str, tuple[MethodConfig, ...]] = {  # "unskipped" is what MIGU adds without what it saves
    "dense": (),
    "migu": (MiguConfig(name="migu"),),
    "unskipped": (MiguConfig(name="migu", skip_rows=False),),
    "kif": (KifConfig(name="kif"),),
}
MANY_STEPS = 1_000_000
"""Length of the learning rate schedule."""


def recipe_of(size: StepSize, stage: int, accumulation: int = 1) -> Recipe:
    """The recipe of `build_engine`, without methods."""
    return Recipe(
        model=ModelConfig(name_or_path="unused"),
        stream=StreamConfig(tasks=(TaskConfig(name="unused", format="builtin"),)),
        train=TrainConfig(
            micro_batch_size=1,
            gradient_accumulation=accumulation,
            dtype=size.dtype,  # type: ignore[arg-type]  # checked with the options
        ),
        zero=ZeroConfig(stage=stage),  # type: ignore[arg-type]
        output_dir="unused",
    )


def build_engine(size: StepSize, stage: int, method: Method, accumulation: int = 1) -> TrainingEngine:
    """An engine around a model of its own, with `accumulation` micro-batches a step."""
    loaded = LoadedModel(build_model(size, device()), None, "causal_lm")  # type: ignore[arg-type]
    return TrainingEngine(loaded, recipe_of(size, stage, accumulation), method)


def batch_of(size: StepSize, seed: int) -> Batch:
    """One sample of random tokens, all of them targets."""
    ids = token_ids(size, seed)[0].tolist()
    return collate([Encoded(0, ids, ids)], "causal_lm", pad_id=0, decoder_start_id=0)


def join_alone() -> None:
    """Become the only rank, unless a launcher has started this process or it has joined already."""
    if torch.distributed.is_initialized():
        return
    if "RANK" not in os.environ:
        os.environ.update(rank_environment(os.environ, 0, 1, find_free_port()))
    join(TIMEOUT_SECONDS)


class EngineStep:
    """An engine that repeats whole steps, optimiser included, on one batch in the stream's second task.

    Args:
        size: Size of the step.
        stage: ZeRO stage.
        method: One of `METHODS`. MIGU masks in this task, and KIF measures importance.
    """

    def __init__(self, size: StepSize, stage: int, method: str) -> None:
        join_alone()
        self._engine = build_engine(size, stage, compose(METHODS[method]))
        self._engine.before_task(TaskPlace(index=1, name=method, steps=MANY_STEPS))
        self._batch = batch_of(size, seed=torch.distributed.get_rank())
        self._targets = self._batch.targets * torch.distributed.get_world_size()
        self._number = 0

    def step(self) -> None:
        """Take one step, and wait until the device has finished it."""
        self._engine.train_step(self._number, [self._batch], self._targets)
        self._number += 1
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def close(self) -> None:
        """Remove the engine."""
        self._engine.destroy()


def race_methods(size: StepSize, stage: int, runs: int, methods: Sequence[str] = tuple(METHODS)) -> Times:
    """Race whole steps of several methods, each with an engine of its own on the same batch."""
    engines = {name: EngineStep(size, stage, name) for name in methods}
    times = race({name: Contestant(engine.step) for name, engine in engines.items()}, runs, WallClock())
    for engine in engines.values():
        engine.close()
    return times
