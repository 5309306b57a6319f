#!/usr/bin/env python3
"""Whole training steps of two ranks over a link of known speed: `cl-dist bench wire`, or run this file.

The ranks are in two network namespaces (`network.py`). Three engines stand side by side on each of them and take turns:
`dense` trains all rows without a method, `off` is MIGU that sends whole gradients and weights, and `compact` is MIGU
that sends the kept rows. Bytes are those that the kernel counts at the interface.
"""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from cl_dist.benchmarks.command import main
from cl_dist.benchmarks.engine_steps import MANY_STEPS, batch_of, build_engine, recipe_of
from cl_dist.benchmarks.harness import Spread, Times, rotated
from cl_dist.benchmarks.network import Unavailable, linked, sent_bytes
from cl_dist.benchmarks.ranks import measure_on_ranks
from cl_dist.benchmarks.report import Column, Entry, Skipped, timed
from cl_dist.benchmarks.shapes import model_of
from cl_dist.benchmarks.step_ranks import environment_of
from cl_dist.benchmarks.training import StepSize, llama_config
from cl_dist.errors import ClDistError
from cl_dist.methods.composed import compose
from cl_dist.methods.config import MethodConfig
from cl_dist.methods.cost import Collective
from cl_dist.methods.migu.config import MiguConfig
from cl_dist.methods.protocol import TaskPlace
from cl_dist.models.tracked import tracked_layers
from cl_dist.planning.setup import Setup
from cl_dist.planning.shape import describe_model
from cl_dist.planning.wire import plan_wire

RANKS = 2
WAYS = ("dense", "off", "compact")
PAIRS = (("compact", "dense"), ("off", "dense"), ("compact", "off"))
PHASES = ("forward", "backward", "optimizer", "gather")
"""Parts of a step: up to the loss, with the choice of rows; backward with the reduction; the checks of the gradient,
its norm and the inner optimiser; what follows, which at stages 1 and 2 is the gathering of the new weights."""
LEAST_ON_LINK = 0.9
"""Share of the bytes that a dense step must send; with fewer, the ranks have found another way to each other."""
COLUMNS = (
    Column("hidden", "hidden"),
    Column("tokens", "tokens"),
    Column("stage", "zero_stage"),
    Column("mask", "mask"),
    Column("link", "rate"),
    Column("dense, ms", "seconds.dense", "milliseconds"),
    Column("off, ms", "seconds.off", "milliseconds"),
    Column("compact, ms", "seconds.compact", "milliseconds"),
    Column("compact / dense: step", "step_compact_over_dense", "ratio"),
    Column("backward", "backward_compact_over_dense", "ratio"),
    Column("optimiser", "optimizer_compact_over_dense", "ratio"),
    Column("gather", "gather_compact_over_dense", "ratio"),
    Column("bytes", "bytes_compact_over_dense", "ratio"),
    Column("bytes of tracked layers", "tracked_bytes_compact_over_dense", "number"),
    Column("off / dense: step", "step_off_over_dense", "ratio"),
    Column("compact / off: step", "step_compact_over_off", "ratio"),
)


def entries(options: Namespace, device: torch.device) -> Iterator[Entry]:
    """Measure the sizes one after the other, each on ranks and a link of its own.

    Raises:
        Skipped: This machine cannot have two network namespaces.
        ClDistError: A rank fails.
    """
    for hidden in options.hidden:
        for tokens in options.tokens:
            yield _entry(_size(hidden, tokens, options), options)


def _size(hidden: int, tokens: int, options: Namespace) -> StepSize:
    widths = model_of(hidden, options.intermediate)
    return StepSize(
        hidden=widths.hidden,
        intermediate=widths.intermediate,
        heads=widths.heads,
        key_value_heads=widths.key_value_heads,
        layers=options.layers or widths.blocks,
        tokens=tokens,
        threshold=options.threshold,
        dtype=options.dtype,
    )


def _entry(size: StepSize, options: Namespace) -> Entry:
    stage = options.zero_stage
    arguments = {"size": asdict(size), "stage": stage, "mask": options.mask, "runs": options.runs}
    # Nobody in the namespaces knows names of addresses, which torch would mention.
    environment = environment_of(options) | {"CUDA_VISIBLE_DEVICES": "", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    try:
        with linked(options.rate) as link:
            found = measure_on_ranks("cl_dist.benchmarks.wire:measure", arguments, RANKS, environment, link.enter)
    except Unavailable as reason:
        raise Skipped(str(reason)) from reason
    expected = planned_bytes(size, stage)
    sent = {way: [sum(ranks) / RANKS for ranks in rounds] for way, rounds in found["bytes"].items()}
    check_link(sent["dense"], sum(expected.values()))
    return {
        **asdict(size),
        "mask": options.mask,
        "rate": options.rate or "unshaped",
        "processes": RANKS,
        "zero_stage": stage,
        "threads_per_rank": found["threads"],
        **_compared(found["seconds"]),
        "bytes_per_rank": {way: Spread.of(rounds).as_dict() for way, rounds in sent.items()},
        "expected_dense_bytes": sum(expected.values()),
        **{f"bytes_{a}_over_{b}": Times(sent).ratio(a, b).as_dict() for a, b in PAIRS},
        "tracked_bytes_compact_over_dense": _of_tracked_layers(size, expected, sent),
    }


def check_link(sent: Sequence[float], expected: int) -> None:
    """Refuse a measurement whose ranks did not use the link, but memory that they share, say.

    Args:
        sent: Bytes that the interface counted, for each dense step.
        expected: Bytes that such a step has to send.

    Raises:
        ClDistError: A step sent clearly less.
    """
    if min(sent) < LEAST_ON_LINK * expected:
        raise ClDistError(
            f"a rank sent {min(sent):.0f} bytes over the link in a dense step, which has to send {expected}: the ranks "
            "have another way to each other, and nothing was measured"
        )


def _compared(seconds: Mapping[str, list[Mapping[str, float]]]) -> Entry:
    """The times of whole steps, and of each phase, one against another in the same round."""
    whole = Times({way: [sum(phases.values()) for phases in rounds] for way, rounds in seconds.items()})
    entry = timed(whole, ())
    entry |= {f"step_{a}_over_{b}": whole.ratio(a, b).as_dict() for a, b in PAIRS}
    entry["phases"] = {}
    for phase in PHASES:
        times = Times({way: [phases[phase] for phases in rounds] for way, rounds in seconds.items()})
        entry["phases"][phase] = {way: times.spread(way).as_dict() for way in seconds}
        entry[f"{phase}_compact_over_dense"] = times.ratio("compact", "dense").as_dict()
    return entry


# What a dense step should send


def planned_bytes(size: StepSize, stage: int, methods: tuple[MethodConfig, ...] = ()) -> dict[str, int]:
    """Bytes that each rank sends in a step, by what they carry, as the plan counts them (`cl_dist.planning.wire`);
    without headers and messages of a few numbers.

    Gloo has no reduce-scatter: torch all-reduces the whole and keeps a piece (`ProcessGroupGloo`).

    Args:
        size: The step.
        stage: ZeRO stage.
        methods: Of the recipe; none: plain training.
    """
    recipe = recipe_of(size, stage)
    recipe = replace(recipe, method=methods) if methods else recipe
    setup = Setup(recipe, 1, RANKS, "cpu", length=size.tokens, answer=size.tokens - 1)
    shape = describe_model(recipe, llama_config(size))
    wire = plan_wire(setup, shape)
    sent: dict[str, int] = {}
    for each in (*wire.step, *wire.methods_step):
        kind = "all_reduce" if each.kind == "reduce_scatter" else each.kind
        sent[each.what] = Collective(kind, each.bytes, each.what).on_the_link(RANKS)
    return sent


def _of_tracked_layers(size: StepSize, expected: Mapping[str, int], sent: Mapping[str, list[float]]) -> float:
    """Bytes of compact over dense steps without those of the parameters that have no mask (embedding, head, norms),
    which both send alike.
    """
    shape = describe_model(recipe_of(size, 2), llama_config(size))
    tracked = {layer.weight for layer in tracked_layers(shape.model, "blocks").values()}
    rest = sum(each.numel for each in shape.parameters if each.name not in tracked) / shape.numel
    alike = rest * sum(expected.values())
    dense, compact = (Spread.of(sent[way]).median for way in ("dense", "compact"))
    return (compact - alike) / (dense - alike)


# On the ranks


class Stopwatch:
    """Measures the phases of an engine's steps on this rank.

    Args:
        engine: Of any ZeRO stage. Its DeepSpeed engine, and the inner optimiser, tell when they are called.
    """

    def __init__(self, engine: Any) -> None:
        self._marks: list[float] = []
        deepspeed = engine._engine
        deepspeed.backward = self._noted(deepspeed.backward)
        deepspeed._take_model_step = self._noted(deepspeed._take_model_step)
        engine.shards.layout.inner.register_step_post_hook(self._stepped)

    def phases(self, step: Callable[[], None]) -> dict[str, float]:
        """Seconds of each phase of one step."""
        self._marks.clear()
        start = time.perf_counter()
        step()
        end = time.perf_counter()
        backward, update = self._marks
        moments = (start, backward, update, self._stepped_at, end)
        return {phase: moments[at + 1] - moments[at] for at, phase in enumerate(PHASES)}

    def _noted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **kwargs: Any) -> Any:
            self._marks.append(time.perf_counter())
            return function(*args, **kwargs)

        return noted

    def _stepped(self, *_: Any) -> None:
        self._stepped_at = time.perf_counter()  # that of the last group of parameters stays


class Trainer:
    """One engine that repeats a step on its batch in the stream's second task.

    Args:
        size: Size of the step on every rank.
        stage: ZeRO stage.
        methods: The recipe's methods.
    """

    def __init__(self, size: StepSize, stage: int, methods: tuple[MethodConfig, ...]) -> None:
        self._engine = build_engine(size, stage, compose(methods))
        self._engine.before_task(TaskPlace(index=1, name="second", steps=MANY_STEPS))
        self._batch = batch_of(size, seed=torch.distributed.get_rank())
        self._step = 0
        self._watch = Stopwatch(self._engine)
        self.measured()  # what is allocated or compiled once

    def measured(self) -> tuple[dict[str, float], int]:
        """Seconds of each phase of one step on this rank, and the bytes that it sent (collective)."""
        torch.distributed.barrier()
        before = sent_bytes()
        phases = self._watch.phases(self._take_step)
        torch.distributed.barrier()  # the other rank has received everything
        return phases, sent_bytes() - before

    def _take_step(self) -> None:
        world = torch.distributed.get_world_size()
        self._engine.train_step(self._step, [self._batch], self._batch.targets * world)
        self._step += 1


def methods_of(way: str, threshold: float, mask: Any) -> tuple[MethodConfig, ...]:
    """The recipe's methods."""
    if way == "dense":
        return ()
    compact: Any = "off" if way == "off" else "auto"
    return (MiguConfig(name="migu", threshold=threshold, mask=mask, compact=compact),)


def measure(size: dict[str, Any], stage: int, mask: str, runs: int) -> dict[str, Any]:
    """Let the ways take turns on every rank (collective): by way and round the slowest rank's seconds of each phase,
    and the bytes that each rank sent.
    """
    made = StepSize(**size)
    trainers = {way: Trainer(made, stage, methods_of(way, made.threshold, mask)) for way in WAYS}
    seconds: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    sent: dict[str, list[list[int]]] = {way: [] for way in WAYS}
    for number in range(runs):
        for way in rotated(WAYS, number):
            everyone: list[Any] = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(everyone, trainers[way].measured())
            seconds[way].append(max((phases for phases, _ in everyone), key=lambda phases: sum(phases.values())))
            sent[way].append([count for _, count in everyone])
    return {"seconds": seconds, "bytes": sent, "threads": torch.get_num_threads()}


if __name__ == "__main__":
    main("wire")
