"""Which rank scores which samples in which batch, and how a batch is padded.

Batches are cut task by task and before they are dealt to the ranks, so a batch holds the same samples, and its padding
the same width, for any number of ranks and whatever other tasks are in the pass: the scores do not depend on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import torch

from cl_dist.tasks.collate import length_mask, pad

PASS_BATCHES = 4
"""Batches for every rank that end a pass: so many are shared out well, and an interrupted pass is lost as a whole."""


@dataclass(frozen=True)
class RankBatch:
    """Samples of one task that one rank scores in one go."""

    indices: list[int]
    task: int = 0
    """Position of the task in the pass."""
    counted: bool = True
    """False for a repeat that only keeps this rank in step with the others."""


def plan_passes(batches: Sequence[int], world: int) -> list[range]:
    """Positions of the tasks of each pass, from the number of batches of each: consecutive tasks, until there are
    `PASS_BATCHES` for each of `world` ranks.

    A large task is so a pass of its own, unless small ones before it wait for company.
    """
    passes, start = [], 0
    for end in range(1, len(batches) + 1):
        if sum(batches[start:end]) >= PASS_BATCHES * world or end == len(batches):
            passes.append(range(start, end))
            start = end
    return passes


def cut_pass(lengths: Sequence[Sequence[int]], batch_sizes: Sequence[int]) -> list[RankBatch]:
    """The batches of several tasks, from the lengths of each task's samples; the costliest first, so that what the
    ranks end with is small.

    A batch costs its samples times its longest one.
    """
    batches = [
        RankBatch(indices, task)
        for task, (own, size) in enumerate(zip(lengths, batch_sizes, strict=True))
        for indices in cut_batches(own, size)
    ]
    return sorted(batches, key=lambda batch: -len(batch.indices) * max(lengths[batch.task][i] for i in batch.indices))


def cut_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Sample indices in batches of similar length, longest first, so that memory runs out at once or not at all.

    As few batches as hold the samples, and all of nearly the same size: a small last one would leave a rank idle while
    the others work on full ones. Samples of equal length keep their order; every sample is in exactly one batch.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    count = -(-len(order) // batch_size)
    cuts = [len(order) * number // count for number in range(count + 1)] if count else [0]
    return [order[start:end] for start, end in pairwise(cuts)]


def rounds(batches: Sequence[RankBatch], world: int) -> int:
    """Most batches that one of `world` ranks is dealt."""
    return -(-len(batches) // world)


def deal_batches(batches: Sequence[RankBatch], rank: int, world: int, synced: bool) -> list[RankBatch]:
    """The batches of one rank: one of each `world` in a row, alternately from the front and from the back, since the
    first of them is the costliest.

    With `synced` every rank gets equally many: under ZeRO-3 each forward gathers the weights from all ranks, so a rank
    that has run out goes through the last batch of the list again, uncounted.
    """
    own: list[RankBatch] = []
    for start in range(0, len(batches), world):
        place = start + (rank if start // world % 2 == 0 else world - 1 - rank)
        own += batches[place : place + 1]
    if synced:
        own += [replace(batches[-1], counted=False)] * (rounds(batches, world) - len(own))
    return own


def pad_side(
    sequences: Sequence[Sequence[int]], pad_id: int, side: Literal["left", "right"], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, both int64 of shape (sequences, longest), padded on one side."""
    real = length_mask([len(sequence) for sequence in sequences]).long()
    if side == "right":
        return pad([list(sequence) for sequence in sequences], pad_id).to(device), real.to(device)
    backwards = pad([list(reversed(sequence)) for sequence in sequences], pad_id)
    return backwards.flip(1).to(device), real.flip(1).to(device)
