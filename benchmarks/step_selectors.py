"""Whole training steps that train a part of the weights known for a task, against dense ones, on ranks of this machine.

Both engines stand side by side on every rank and take turns. A step is all of it: forward and backward of every
micro-batch, reduction, clipping, the optimiser, and the gathering of new weights.
"""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from cl_dist.benchmarks.engine_steps import MANY_STEPS, batch_of, build_engine
from cl_dist.benchmarks.harness import Times, rotated
from cl_dist.benchmarks.ranks import measure_on_ranks
from cl_dist.benchmarks.report import Entry, timed
from cl_dist.benchmarks.step_ranks import DEFAULT_STAGE, environment_of
from cl_dist.benchmarks.training import StepSize, token_ids
from cl_dist.engine.device import device, uses_gpu
from cl_dist.engine.trainer import Collator, EngineProbe
from cl_dist.methods.composed import Composed
from cl_dist.methods.hft.config import HftConfig
from cl_dist.methods.hft.method import Hft
from cl_dist.methods.protocol import Method, TaskPlace
from cl_dist.methods.s2ft.config import S2ftConfig
from cl_dist.methods.s2ft.method import S2ft
from cl_dist.methods.ssu.config import SsuConfig
from cl_dist.methods.ssu.method import Ssu
from cl_dist.tasks.types import Encoded

DEFAULT_RANKS = 2
CALIBRATION = 2
"""Samples that source-shielded updates measure before the first step, which is not timed."""


def entry_of(size: StepSize, options: Namespace) -> Entry:
    """Start the ranks, and compare times and bytes. Raises ClDistError if a rank fails."""
    stage = DEFAULT_STAGE if options.zero_stage is None else options.zero_stage
    processes, accumulation = options.processes or DEFAULT_RANKS, options.accumulation or 1
    arguments = {
        "size": asdict(size), "stage": stage, "runs": options.runs, "selector": options.selector,
        "accumulation": accumulation,
    }  # fmt: skip
    found = measure_on_ranks(
        "cl_dist.benchmarks.step_selectors:race_selector", arguments, processes, environment_of(options)
    )
    dense, selected = (found["state_bytes"][way] for way in ("dense", "selected"))
    return {
        **asdict(size),
        "selector": options.selector,
        "accumulation": accumulation,
        "processes": processes,
        "zero_stage": stage,
        "threads_per_rank": found["threads"],
        **timed(Times(found["seconds"]), (("selected", "dense"),)),
        "kept_share": found["kept_share"],
        "state_bytes_per_rank": {"dense": dense, "selected": selected},
        "state_share": selected / dense,
    }


def method_of(selector: str, keep: float) -> Method:
    """The method whose parts of the weights are `keep` of them, as far as it has such a setting."""
    if selector == "hft":
        return Hft(HftConfig(name="hft", keep=keep))
    if selector == "s2ft":
        return S2ft(
            S2ftConfig(name="s2ft", heads=keep, channels=keep, matrices=("value", "output", "up", "gate", "down"))
        )
    return Ssu(SsuConfig(name="ssu", calibration="made up", keep=keep))


class Trainer:
    """One engine and one global batch.

    Args:
        size: Size of a micro-batch on every rank.
        stage: ZeRO stage.
        method: What trains a part; None: nothing, the step is dense.
        accumulation: Micro-batches of a step.
    """

    def __init__(self, size: StepSize, stage: int, method: Method | None, accumulation: int) -> None:
        rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.engine = build_engine(size, stage, Composed([method] if method else []), accumulation)
        self._batches = [batch_of(size, seed=rank * accumulation + number) for number in range(accumulation)]
        self._targets = sum(batch.targets for batch in self._batches) * world
        texts = [token_ids(size, seed)[0].tolist() for seed in range(CALIBRATION)]
        probe = EngineProbe(
            self.engine,
            Collator("causal_lm", None, 0, None),  # type: ignore[arg-type]  # only a masked model asks the tokenizer
            (),
            lambda _: [],
            lambda *_: self._batches[0],
            {"calibration": [Encoded(number, ids, ids) for number, ids in enumerate(texts)]},
        )
        self.engine.before_task(TaskPlace(0, "selected", MANY_STEPS, probe=probe))
        self._step = 0
        self.step()  # it chooses

    def step(self) -> None:
        """One optimiser step, and wait until the device has finished it."""
        self.engine.train_step(self._step, self._batches, self._targets)
        self._step += 1
        if uses_gpu():
            torch.cuda.synchronize()


def slowest(step: Callable[[], object]) -> float:
    """Seconds that a step takes on the slowest rank (collective)."""
    torch.distributed.barrier()
    start = time.perf_counter()
    step()
    elapsed = torch.tensor(time.perf_counter() - start, dtype=torch.float64, device=device())
    torch.distributed.all_reduce(elapsed, op=torch.distributed.ReduceOp.MAX)
    return float(elapsed)


def race_selector(size: dict[str, Any], stage: int, runs: int, selector: str, accumulation: int) -> dict[str, Any]:
    """Race the two on every rank (collective): the seconds of the slowest one, and the bytes that this one holds."""
    made = StepSize(**size)
    method = method_of(selector, 1 - made.threshold)
    trainers = {way: Trainer(made, stage, each, accumulation) for way, each in (("dense", None), ("selected", method))}
    # A step takes up to a minute, so none is spent on warming up: each trainer has taken one already.
    seconds: dict[str, list[float]] = {way: [] for way in trainers}
    for number in range(runs):
        for way in rotated(list(trainers), number):
            seconds[way].append(slowest(trainers[way].step))
    return {
        "seconds": seconds,
        "threads": torch.get_num_threads(),
        "kept_share": method.kept_share(),
        "state_bytes": {way: trainer.engine.shards.state_bytes for way, trainer in trainers.items()},
    }
