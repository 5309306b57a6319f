"""Which samples are in which batch on which rank: pure index arithmetic, the same on every rank and after a resume."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from cl_dist.config.schema import Recipe

FILLER = -1
"""Index for a place in a micro-batch without a sample."""

MEGABATCH = 50
"""Samples are sorted by length within N global batches: enough to find similar ones, few enough to stay random."""


def planned_steps(recipe: Recipe, index: int, counts: Sequence[int], ranks: int) -> int:
    """Optimiser steps of task `index` on `ranks` ranks, including those on samples that methods add.

    `counts` has the training samples of all tasks. For plain text, they are known only once it is tokenised; until
    then the result is an estimate.
    """
    train, task = recipe.train, recipe.stream.tasks[index]
    samples = counts[index] + sum(method.samples_per_epoch(index, counts) - counts[index] for method in recipe.method)
    steps = (task.epochs or train.epochs) * ceil(
        samples / (train.micro_batch_size * train.gradient_accumulation * ranks)
    )
    steps = min(steps, train.max_steps_per_task or steps)
    return steps + (sum(method.memory_steps(steps) for method in recipe.method) if index else 0)


class BatchPlan:
    """The batches of one task's training.

    A pure function of its arguments, so steps can be requested in any order. Which samples a step learns depends only
    on the product of `micro_batch_size`, `gradient_accumulation` and `ranks`, not on how it is split.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        micro_batch_size: int,
        gradient_accumulation: int,
        ranks: int,
        epochs: int,
        max_steps: int | None,
        shuffle: bool,
        group_by_length: bool,
        seed: int,
    ) -> None:
        """`lengths` are the samples' lengths in tokens. `group_by_length` needs `shuffle`.

        Raises ValueError without samples.
        """
        if not lengths:
            raise ValueError("a batch plan needs at least one sample")
        self._lengths = lengths
        self._micro_batch_size = micro_batch_size
        self._accumulation = gradient_accumulation
        self._ranks = ranks
        self._max_steps = max_steps
        self._epochs = epochs
        self._shuffle = shuffle
        self._group_by_length = group_by_length
        self._seed = seed
        self._cached: tuple[int, Sequence[int]] = (-1, ())

    @property
    def global_batch_size(self) -> int:
        """Samples of a full optimiser step over all ranks."""
        return self._micro_batch_size * self._accumulation * self._ranks

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps of one pass; the last one may be short."""
        return ceil(len(self._lengths) / self.global_batch_size)

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole task."""
        total = self._epochs * self.steps_per_epoch
        return total if self._max_steps is None else min(total, self._max_steps)

    def step(self, step: int) -> list[int]:
        """Sample indices of a step's global batch, without fillers. Raises IndexError outside `0 <= step < steps`."""
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} of {self.steps}")
        epoch, batch = divmod(step, self.steps_per_epoch)
        start = batch * self.global_batch_size
        return list(self._order(epoch)[start : start + self.global_batch_size])

    def micro_batches(self, step: int, rank: int) -> list[list[int]]:
        """The `gradient_accumulation` micro-batches of a rank in a step, each with `micro_batch_size` indices.

        The rank gets one consecutive piece of the global batch. A short batch is spread evenly over ranks and
        micro-batches, which are then padded with FILLER.
        """
        own = share(self.step(step), self._ranks, rank)
        pieces = [share(own, self._accumulation, number) for number in range(self._accumulation)]
        return [piece + [FILLER] * (self._micro_batch_size - len(piece)) for piece in pieces]

    def filled(self, step: int) -> int:
        """The number of micro-batches of a step, over all ranks, that hold at least one sample."""
        each, more = divmod(len(self.step(step)), self._ranks)
        return more * min(each + 1, self._accumulation) + (self._ranks - more) * min(each, self._accumulation)

    def _order(self, epoch: int) -> Sequence[int]:
        """All sample indices in the order of an epoch. Caches the last epoch."""
        if self._cached[0] != epoch:
            self._cached = (epoch, self._draw_order(epoch))
        return self._cached[1]

    def _draw_order(self, epoch: int) -> Sequence[int]:
        if not self._shuffle:
            return range(len(self._lengths))
        rng = random.Random(f"{self._seed}/{epoch}")
        order = list(range(len(self._lengths)))
        rng.shuffle(order)
        return self._grouped(order, rng) if self._group_by_length else order

    def _grouped(self, order: list[int], rng: random.Random) -> list[int]:
        """The shuffled order, rearranged so that a global batch has samples of similar length."""
        size = self.global_batch_size
        mega = MEGABATCH * size
        # Sort by length within a megabatch only: over the whole epoch, all epochs would have nearly the same batches.
        by_length = [
            index
            for start in range(0, len(order), mega)
            for index in sorted(order[start : start + mega], key=self._lengths.__getitem__, reverse=True)
        ]
        # Shuffle the batches, so that their length does not fall step by step. A short last batch stays last.
        full = [by_length[start : start + size] for start in range(0, len(order) - size + 1, size)]
        rng.shuffle(full)
        return [index for batch in full for index in batch] + by_length[len(full) * size :]


@dataclass(frozen=True)
class Cycles:
    """Alternates `inner` steps on a task's own samples with `outer` steps on samples of past tasks."""

    own: int
    """Steps on own samples in the whole task."""
    inner: int
    outer: int
    last: bool = True
    """Whether `outer` steps also follow the last own steps if there are fewer than `inner`."""
    scheduled: bool = True
    """Whether the learning-rate schedule counts steps on past samples."""

    @property
    def steps(self) -> int:
        """All steps."""
        return self.own + self.outer * (ceil(self.own / self.inner) if self.last else self.own // self.inner)

    @property
    def outer_steps(self) -> int:
        """Steps on past samples."""
        return self.steps - self.own

    def locate(self, step: int) -> tuple[bool, int]:
        """Whether a step learns past samples, and its number among the steps of that kind."""
        cycle, position = divmod(step, self.inner + self.outer)
        inner = self._inner(cycle)
        if position < inner:
            return False, cycle * self.inner + position
        return True, cycle * self.outer + position - inner

    def schedule(self, step: int) -> tuple[int, int]:
        """The position of a step in the learning-rate schedule, and the schedule's length.

        A step that the schedule does not count has the position of the next own step.
        """
        if self.scheduled:
            return step, self.steps
        past, number = self.locate(step)
        done = number if not past else (number // self.outer + 1) * self.inner
        return min(done, self.own), self.own

    def starts(self, step: int) -> bool:
        """Whether a step is the first of a cycle."""
        return step % (self.inner + self.outer) == 0

    def turns(self, step: int) -> bool:
        """Whether a step is the first on past samples of its cycle."""
        cycle, position = divmod(step, self.inner + self.outer)
        return position == self._inner(cycle)

    def ends(self, step: int) -> bool:
        """Whether a step is the last of a cycle."""
        cycle, position = divmod(step, self.inner + self.outer)
        return position == self._inner(cycle) + self.outer - 1

    def _inner(self, cycle: int) -> int:
        return min(self.inner, self.own - cycle * self.inner)


class InterleavedPlan:
    """Alternates, in cycles, between a plan over own samples and one over past samples, numbered after the own ones."""

    def __init__(self, own: BatchPlan, past: BatchPlan, cycles: Cycles, first_past: int) -> None:
        self._own, self._past, self._cycles, self._first_past = own, past, cycles, first_past

    @property
    def steps(self) -> int:
        """Optimiser steps of both kinds."""
        return self._cycles.steps

    def step(self, step: int) -> list[int]:
        """Sample indices of a step's global batch, without fillers. Raises IndexError outside `0 <= step < steps`."""
        past, number = self._locate(step)
        return self._shifted(self._past.step(number)) if past else self._own.step(number)

    def micro_batches(self, step: int, rank: int) -> list[list[int]]:
        """As `BatchPlan.micro_batches`."""
        past, number = self._locate(step)
        if not past:
            return self._own.micro_batches(number, rank)
        return [self._shifted(indices) for indices in self._past.micro_batches(number, rank)]

    def filled(self, step: int) -> int:
        """As `BatchPlan.filled`."""
        past, number = self._locate(step)
        return (self._past if past else self._own).filled(number)

    def _locate(self, step: int) -> tuple[bool, int]:
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} of {self.steps}")
        return self._cycles.locate(step)

    def _shifted(self, indices: list[int]) -> list[int]:
        return [index if index == FILLER else index + self._first_past for index in indices]


def share(items: list[int], parts: int, number: int) -> list[int]:
    """Piece `number` of a list cut into `parts` consecutive pieces. Lengths differ by at most one, longer first."""
    quotient, remainder = divmod(len(items), parts)
    start = number * quotient + min(number, remainder)
    return items[start : start + quotient + (number < remainder)]
