"""What a method adds to a run, in bytes: memory, saved state, and collectives. `Method.cost` answers in these terms."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import nn

    from cl_dist.config.schema import TrainConfig

ADAMW_BYTES = 28
"""Bytes that AdamW reads and writes per element: it reads master, gradient and both moments, and writes all but one."""

Kind = Literal["all_reduce", "reduce", "reduce_scatter", "all_gather", "broadcast"]


@dataclass(frozen=True)
class Collective:
    """Calls of one collective on every rank.

    `bytes` is what the calls work on, by the usual convention (nccl-tests, doc/PERFORMANCE.md): the whole tensor of an
    all-reduce, a reduce or a broadcast, the input of a reduce-scatter, and the output of an all-gather.
    """

    kind: Kind
    bytes: int
    """Over all calls."""
    what: str
    """What is communicated, in a few words."""
    calls: int = 1

    def on_the_link(self, world: int) -> int:
        """Bytes that each rank sends with a ring of `world` ranks, optimal for large tensors.

        An all-reduce is a reduce-scatter followed by an all-gather, each of which passes on every piece but one
        (Patarasuk and Yuan 2009, doi 10.1016/j.jpdc.2008.09.002). In a reduction to one rank or a broadcast from one,
        every rank but one passes on the whole tensor; this is the mean.
        """
        passes = 2 if self.kind == "all_reduce" else 1
        return passes * self.bytes * (world - 1) // world


@dataclass(frozen=True)
class RankShare:
    """What a rank has of a model that is trained in a given set-up: all that a method needs to know about its cost."""

    model: nn.Module
    """The model on the meta device, with its adapters; shapes only."""
    train: TrainConfig
    shapes: Mapping[str, tuple[int, ...]]
    """Whole shapes of the trainable parameters, in model order."""
    owned: Mapping[str, int]
    """Elements of each trainable parameter whose float32 master this rank owns; absent if none."""
    gradient_bytes: int
    """Bytes of an element of the reduced gradient."""
    itemsize: int
    """Bytes of an element of a weight."""
    world: int
    """Number of ranks."""
    stage: int
    """ZeRO stage."""
    masters_on_host: bool
    """Whether masters and moments are offloaded."""
    tasks: int
    """Number of tasks of the stream; 0 if not known."""
    tokens: int
    """Tokens of the longest micro-batch, with padding."""
    gpu: bool
    """Whether the rank trains on a GPU."""

    @property
    def replicated(self) -> bool:
        """Whether every rank owns everything."""
        return self.stage == 0

    @property
    def sharded(self) -> bool:
        """Whether every rank holds its share of the weights only."""
        return self.stage == 3

    @property
    def gathers_updates(self) -> bool:
        """Whether the ranks gather the updated weights after a step: each computes a share, and all hold the whole."""
        return self.stage in (1, 2)

    @property
    def elements(self) -> int:
        """Elements of all masters that this rank owns."""
        return sum(self.owned.values())

    def all_reduce(self, bytes: int, what: str, calls: int = 1) -> Collective:
        """An all-reduce over all ranks."""
        return Collective("all_reduce", bytes, what, calls)

    def sum_over_ranks(self, bytes: int, what: str) -> Collective:
        """What `ShardView.sum_over_ranks` does."""
        return Collective("broadcast" if self.replicated else "all_reduce", bytes, what)

    def publish(self) -> tuple[Collective, ...]:
        """What `ShardView.publish` does: stages 1 and 2 gather all trained weights; stage 3 gathers only small ones,
        which are left out here.
        """
        elements = sum(math.prod(shape) for shape in self.shapes.values())
        whole = Collective("all_gather", elements * self.itemsize, "changed weights")
        return (whole,) if self.gathers_updates else ()


@dataclass(frozen=True)
class Cost:
    """What a method adds on one rank, by component. Memory that is held throughout a task, unless stated otherwise."""

    device: Mapping[str, int] = field(default_factory=dict)
    """Bytes next to the model."""
    host: Mapping[str, int] = field(default_factory=dict)
    """Bytes in CPU memory."""
    stepping: Mapping[str, int] = field(default_factory=dict)
    """Bytes beside the masters, only while the optimiser steps."""
    saved: int = 0
    """Bytes of tensors that this rank writes into a checkpoint."""
    passes: int = 0
    """Further forward and backward passes in every step, which communicate as the step's own do."""
    step: tuple[Collective, ...] = ()
    """Collectives of one optimiser step."""
    task: tuple[Collective, ...] = ()
    """Collectives at the end of a task."""
    traffic: int = 0
    """Bytes read and written in an optimiser step, where the masters lie; negative for what AdamW leaves alone."""
    token_traffic: int = 0
    """Bytes read and written on the device for each token of a forward pass."""
    skipped: Mapping[str, float] = field(default_factory=dict)
    """By name of a weight: the share of its gradient's product that backward does not compute."""
    unsent_gradients: int = 0
    """Elements of the gradient that the ranks leave out when they reduce it, where packed gradients can travel
    (`sharding.compact.whole_gradients`)."""
    unsent_weights: int = 0
    """Elements that stages 1 and 2 leave out when they gather the updated weights."""

    @staticmethod
    def beside_masters(share: RankShare, parts: Mapping[str, int]) -> Cost:
        """Memory that lies where the masters lie, by component."""
        return Cost(host=parts) if share.masters_on_host else Cost(device=parts)

    @staticmethod
    def total(costs: Iterable[Cost]) -> Cost:
        """The sum of several methods' costs."""
        whole = Cost()
        for cost in costs:
            whole = whole + cost
        return whole

    def __add__(self, other: Cost) -> Cost:
        """Both together; equal names of components are added up."""
        return Cost(
            device=_merged(self.device, other.device),
            host=_merged(self.host, other.host),
            stepping=_merged(self.stepping, other.stepping),
            saved=self.saved + other.saved,
            passes=self.passes + other.passes,
            step=self.step + other.step,
            task=self.task + other.task,
            traffic=self.traffic + other.traffic,
            token_traffic=self.token_traffic + other.token_traffic,
            skipped={**self.skipped, **other.skipped},
            unsent_gradients=self.unsent_gradients + other.unsent_gradients,
            unsent_weights=self.unsent_weights + other.unsent_weights,
        )


def _merged(one: Mapping[str, int], other: Mapping[str, int]) -> dict[str, int]:
    return {name: one.get(name, 0) + other.get(name, 0) for name in dict.fromkeys((*one, *other))}
