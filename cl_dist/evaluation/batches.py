"""Which rank scores which samples in which batch.

The samples of each task are divided into batches before the batches are distributed over the ranks. A batch therefore
has the same samples and the same padded width for any number of ranks and any other tasks in the pass, and scores do
not depend on either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

PASS_BATCHES = 4
"""Batches per rank that close a pass: enough to balance the load, and few, since an interrupted pass is lost."""


@dataclass(frozen=True)
class RankBatch:
    """Samples of one task that a rank scores in one forward pass."""

    indices: list[int]
    task: int = 0
    """Position of the task in the pass."""
    counted: bool = True
    """False for a repetition that only keeps this rank in step with the others."""


def plan_passes(batches: Sequence[int], world: int) -> list[range]:
    """Group consecutive tasks into passes, given each task's number of batches. Returns their positions per pass.

    A pass is closed when it has `PASS_BATCHES` batches for each of `world` ranks. So a large task has a pass to itself,
    unless there are small ones before it.
    """
    passes, start = [], 0
    for end in range(1, len(batches) + 1):
        if sum(batches[start:end]) >= PASS_BATCHES * world or end == len(batches):
            passes.append(range(start, end))
            start = end
    return passes


def cut_pass(lengths: Sequence[Sequence[int]], batch_sizes: Sequence[int]) -> list[RankBatch]:
    """The batches of several tasks, given the lengths of each task's samples, the most expensive batch first.

    The cost of a batch is its number of samples times the longest one. With cheap batches at the end, the ranks finish
    at about the same time.
    """
    batches = [
        RankBatch(indices, task)
        for task, (own, size) in enumerate(zip(lengths, batch_sizes, strict=True))
        for indices in cut_batches(own, size)
    ]
    return sorted(batches, key=lambda batch: -len(batch.indices) * max(lengths[batch.task][i] for i in batch.indices))


def cut_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Sample indices in batches of similar length, longest first, so that memory runs out immediately or not at all.

    There are as few batches as possible, and all have nearly the same size: a small last one would leave a rank idle
    while the others work on full ones. Samples of equal length keep their order; every sample is in exactly one batch.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    count = -(-len(order) // batch_size)
    cuts = [len(order) * number // count for number in range(count + 1)] if count else [0]
    return [order[start:end] for start, end in pairwise(cuts)]


def rounds(batches: Sequence[RankBatch], world: int) -> int:
    """Largest number of batches that one of `world` ranks gets."""
    return -(-len(batches) // world)


def deal_batches(batches: Sequence[RankBatch], rank: int, world: int, synced: bool) -> list[RankBatch]:
    """The batches of one rank: one from each group of `world`, alternately from the front and from the back, because
    the first batch of each group is the most expensive.

    With `synced` every rank gets the same number: under ZeRO-3 each forward pass gathers the weights from all ranks, so
    a rank without a batch in the last round repeats the last batch of the list, uncounted.
    """
    own: list[RankBatch] = []
    for start in range(0, len(batches), world):
        place = start + (rank if start // world % 2 == 0 else world - 1 - rank)
        own += batches[place : place + 1]
    if synced:
        own += [replace(batches[-1], counted=False)] * (rounds(batches, world) - len(own))
    return own
