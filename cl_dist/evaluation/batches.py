"""Which rank scores which samples in which batch, and how a batch is padded.

Batches are cut before they are dealt to the ranks, so a batch holds the same samples, and its padding the same width,
for any number of ranks: the scores do not depend on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch

from cl_dist.tasks.collate import length_mask, pad


@dataclass(frozen=True)
class RankBatch:
    """Samples that one rank scores in one go."""

    indices: list[int]
    counted: bool = True
    """False for a repeat that only keeps this rank in step with the others."""


def cut_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Sample indices in batches of similar length, longest first, so that memory runs out at once or not at all.

    As few batches as hold the samples, and all of nearly the same size: a small last one would leave a rank idle while
    the others work on full ones. Samples of equal length keep their order; every sample is in exactly one batch.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    count = -(-len(order) // batch_size)
    cuts = [len(order) * number // count for number in range(count + 1)] if count else [0]
    return [order[start:end] for start, end in pairwise(cuts)]


def rounds(batches: Sequence[list[int]], world: int) -> int:
    """Most batches that one of `world` ranks is dealt."""
    return -(-len(batches) // world)


def deal_batches(batches: Sequence[list[int]], rank: int, world: int, synced: bool) -> list[RankBatch]:
    """Batches `rank`, `rank + world`, ... of the list.

    With `synced` every rank gets equally many: under ZeRO-3 each forward gathers the weights from all ranks, so a rank
    that has run out goes through the last batch of the list again, uncounted.
    """
    own = [RankBatch(batch) for batch in batches[rank::world]]
    if synced:
        own += [RankBatch(batches[-1], counted=False)] * (rounds(batches, world) - len(own))
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
