"""Masked and dense training steps under DeepSpeed, on ranks started on this machine.

One engine alternates between MIGU's first task, which is dense, and its second task, which is masked. The measured time
ends with `Migu.before_update`, before the optimiser starts.
"""

from __future__ import annotations

import os
import time
from argparse import Namespace
from dataclasses import asdict
from typing import Any

import torch

from cl_dist.benchmarks.engine_steps import MANY_STEPS, batch_of, build_engine
from cl_dist.benchmarks.harness import Contestant, Times, race
from cl_dist.benchmarks.ranks import measure_on_ranks
from cl_dist.benchmarks.training import StepSize
from cl_dist.engine.device import device, uses_gpu
from cl_dist.methods.composed import Composed
from cl_dist.methods.migu.config import MiguConfig
from cl_dist.methods.migu.method import Migu
from cl_dist.methods.protocol import TaskPlace

DEFAULT_STAGE = 2
WAYS = ("dense", "masked")
"""MIGU's mode in the first and in the second task of a stream."""


def race_on_ranks(size: StepSize, stage: int, options: Namespace) -> tuple[Times, int]:
    """Start `--processes` ranks that measure; return the times of the slowest rank, and the threads per rank.

    Raises ClDistError if a rank fails.
    """
    arguments = {"size": asdict(size), "stage": stage, "runs": options.runs}
    found = measure_on_ranks(
        "cl_dist.benchmarks.step_ranks:race_ways", arguments, options.processes, environment_of(options)
    )
    return Times(found["seconds"]), int(found["threads"])


def environment_of(options: Namespace) -> dict[str, str]:
    """The ranks' environment: their threads and their device."""
    environment = dict(os.environ)
    if options.threads is not None:
        environment["OMP_NUM_THREADS"] = str(options.threads)
    if options.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return environment


class Timed(Migu):
    """MIGU that records when it has finished with the gradients."""

    done = 0.0

    def before_update(self) -> None:
        """Record the time at which the optimiser starts."""
        super().before_update()
        if uses_gpu():
            torch.cuda.synchronize()
        self.done = time.perf_counter()


class RankClock:
    """Measures the time until the gradients are ready on the slowest rank.

    Args:
        method: Records when they are.
    """

    def __init__(self, method: Timed) -> None:
        self._method = method

    def seconds(self, contestant: Contestant, repeats: int) -> float:
        """Time of one run; a step is long enough that one is sufficient."""
        contestant.prepare()
        torch.distributed.barrier()
        start = time.perf_counter()
        contestant.run()
        # The step takes as long as its slowest rank.
        elapsed = torch.tensor(self._method.done - start, dtype=torch.float64, device=device())
        torch.distributed.all_reduce(elapsed, op=torch.distributed.ReduceOp.MAX)
        return float(elapsed)


class Trainer:
    """One engine and one batch.

    Args:
        size: Size of the step on every rank.
        stage: ZeRO stage.
    """

    def __init__(self, size: StepSize, stage: int) -> None:
        self.method = Timed(MiguConfig(name="migu", threshold=size.threshold))
        self._engine = build_engine(size, stage, Composed([self.method]))
        self._batch = batch_of(size, seed=torch.distributed.get_rank())
        self._step = 0

    def contestant(self, index: int) -> Contestant:
        """A step of the task at this position in the stream."""
        place = TaskPlace(index=index, name=WAYS[index], steps=MANY_STEPS)
        return Contestant(self._train_step, prepare=lambda: self._engine.before_task(place))

    def _train_step(self) -> None:
        world = torch.distributed.get_world_size()
        self._engine.train_step(self._step, [self._batch], self._batch.targets * world)
        self._step += 1


def race_ways(size: dict[str, Any], stage: int, runs: int) -> dict[str, Any]:
    """Race the ways on every rank (collective): the seconds of the slowest rank, and the threads of this one."""
    trainer = Trainer(StepSize(**size), stage)
    contestants = {way: trainer.contestant(index) for index, way in enumerate(WAYS)}
    times = race(contestants, runs, RankClock(trainer.method))
    return {"seconds": times.seconds, "threads": torch.get_num_threads()}
