"""Masks that decide about single elements, as the public code of Recurrent-KIF has them: the threshold is a quantile of
all elements' scores, which lie on all ranks and are never brought together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch

from cl_dist.methods.kif.importance import Importance
from cl_dist.sharding import ShardView

DIGIT = 16
"""Bits of a score that one pass over the elements decides: four passes, with 65,536 counts to add up over the ranks."""


def threshold(importance: Importance, shards: ShardView, percent: float, device: torch.device) -> float:
    """The largest score of an unimportant element: those above it are the `percent` % with the largest scores
    (collective).

    An element is important where its score is above the (100 - percent)th percentile. The percentile lies between two
    neighbouring scores, and the lower one draws the same line.

    Args:
        importance: Whose elements.
        shards: The engine's shards.
        percent: As `threshold` in the recipe.
        device: Where collectives run.
    """
    names = list(importance.smoothed)
    count = sum(shards.numel(name) for name in shards.names)
    rank = math.floor((100.0 - percent) / 100.0 * (count - 1))

    def keys() -> Iterator[torch.Tensor]:
        for name in names:
            for _, scores in importance.element_scores(name):
                yield scores.view(torch.int64)  # scores are not negative, and such floats are ordered as their bits are

    return _to_float(select(keys, rank, lambda counts: shards.sum_over_ranks(counts.to(device)).cpu()))


def select(
    keys: Callable[[], Iterator[torch.Tensor]], rank: int, over_ranks: Callable[[torch.Tensor], torch.Tensor]
) -> int:
    """The key that has `rank` keys before it in ascending order, of all ranks' keys (radix selection).

    Args:
        keys: Gives this rank's keys, `(n,)` int64 and none of them negative, in chunks; asked once for every digit.
        rank: From 0.
        over_ranks: Adds counts up over the ranks.
    """
    prefix = 0
    for shift in range(64 - DIGIT, -1, -DIGIT):
        counts = torch.zeros(1 << DIGIT, dtype=torch.float64)  # exact: no model has 2^53 elements
        for chunk in keys():
            upper = chunk >> (shift + DIGIT) if shift + DIGIT < 64 else torch.zeros_like(chunk)
            digits = (chunk[upper == prefix] >> shift) & ((1 << DIGIT) - 1)
            counts += torch.bincount(digits, minlength=1 << DIGIT).cpu()
        before = over_ranks(counts).cumsum(0)
        digit = int((before <= rank).sum())
        rank -= int(before[digit - 1]) if digit else 0
        prefix = prefix << DIGIT | digit
    return prefix


def _to_float(key: int) -> float:
    return float(torch.tensor([key], dtype=torch.int64).view(torch.float64))
