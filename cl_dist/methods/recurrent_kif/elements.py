"""Masks of single elements, as in the public code of Recurrent-KIF.

Their threshold is a quantile over the scores of all elements, which are spread over the ranks and never gathered.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch

from cl_dist.methods.kif.importance import Importance
from cl_dist.sharding import ShardView

DIGIT = 16
"""Bits of a score that one pass over the elements settles: four passes, each summing 65,536 counts over the ranks."""


def threshold(importance: Importance, shards: ShardView, percent: float, device: torch.device) -> float:
    """The largest score of an unimportant element: the `percent` % of elements above it are important (collective).

    An element is important if its score is above the (100 - percent)th percentile. That percentile lies between two
    neighbouring scores, and comparing with the lower one gives the same result.

    Args:
        importance: Scores the elements.
        shards: The engine's shards.
        percent: `threshold` in the recipe.
        device: Where collectives run.
    """
    names = list(importance.smoothed)
    count = sum(shards.numel(name) for name in shards.names)
    rank = math.floor((100.0 - percent) / 100.0 * (count - 1))

    def keys() -> Iterator[torch.Tensor]:
        for name in names:
            for _, scores in importance.element_scores(name):
                yield scores.view(torch.int64)  # scores are not negative, and such floats have the order of their bits

    key = select(keys, rank, lambda counts: shards.sum_over_ranks(counts.to(device)).cpu())
    return float(torch.tensor([key], dtype=torch.int64).view(torch.float64))


def select(
    keys: Callable[[], Iterator[torch.Tensor]], rank: int, over_ranks: Callable[[torch.Tensor], torch.Tensor]
) -> int:
    """The key at position `rank` among all ranks' keys in ascending order (radix selection).

    Args:
        keys: Yields this rank's keys in chunks, `(n,)` int64, none negative; called once per digit.
        rank: 0-based position.
        over_ranks: Sums counts over the ranks.
    """
    prefix = 0  # the upper digits of the key, as far as they are known
    for shift in range(64 - DIGIT, -1, -DIGIT):
        # Count the next digit of the keys that share the prefix; float64 is exact, as no model has 2^53 elements.
        counts = torch.zeros(1 << DIGIT, dtype=torch.float64)
        for chunk in keys():
            upper = chunk >> (shift + DIGIT) if shift + DIGIT < 64 else torch.zeros_like(chunk)
            digits = (chunk[upper == prefix] >> shift) & ((1 << DIGIT) - 1)
            counts += torch.bincount(digits, minlength=1 << DIGIT).cpu()
        # The digit is the one whose keys include position `rank`.
        before = over_ranks(counts).cumsum(0)
        digit = int((before <= rank).sum())
        rank -= int(before[digit - 1]) if digit else 0
        prefix = prefix << DIGIT | digit
    return prefix
