"""Finds the elements of largest magnitude in each parameter, whose elements are spread over the ranks.

Nothing is gathered or sorted. Magnitudes become integers of the same order, and a radix select finds each parameter's
smallest kept one, eight bits at a time, for all parameters together: the ranks add up how many of their elements have
each value of the next eight bits. The result does not depend on the number of ranks or on where the shards are cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch

from cl_dist.sharding import Shard

DIGIT = 8
"""Bits that one pass over the elements settles."""
PASSES = 4
"""Passes over the elements, each with one all-reduce of 256 counts per parameter."""
CHUNK = 1 << 22
"""Elements that are looked at together, which bounds the temporary tensors."""
_NAN = 0x7F800001
"""Magnitude of every NaN as an integer: above infinity, as in `torch.topk`."""


class Ranks(NamedTuple):
    """The ranks whose shards together hold every element once."""

    rank: int
    world: int
    total: Callable[[torch.Tensor], torch.Tensor]
    """Adds up a tensor of int64 counts over these ranks (collective)."""


ALONE = Ranks(0, 1, lambda counts: counts)
"""A rank that holds everything."""


def ranks_of(replicated: bool, device: torch.device) -> Ranks:
    """The ranks that share the elements; a rank that has everything asks nobody.

    Args:
        replicated: Whether every rank has everything.
        device: Where collectives run.
    """
    if replicated or torch.distributed.get_world_size() == 1:
        return ALONE

    def total(counts: torch.Tensor) -> torch.Tensor:
        summed = counts.to(device)
        torch.distributed.all_reduce(summed)
        return summed.cpu()

    return Ranks(torch.distributed.get_rank(), torch.distributed.get_world_size(), total)


class Cut(NamedTuple):
    """Which elements of a parameter are kept: those above the cut, and of those equal to it the first ones."""

    key: int
    """Magnitude at the cut, as an integer of the same order."""
    stop: int
    """Elements with this magnitude are kept if their number in the flattened parameter is smaller."""

    def keep(self, shard: Shard) -> torch.Tensor:
        """Which elements of a shard of the same scores are kept: `(numel,)` bool, on the shard's device."""
        keep = torch.empty(shard.data.numel(), dtype=torch.bool, device=shard.data.device)
        for start, keys in _keys(shard):
            part = keep.narrow(0, start, keys.numel())
            torch.gt(keys, self.key, out=part)
            first = self.stop - shard.start - start  # elements of this chunk that a tie keeps
            if first > 0:
                part[:first] |= keys[:first] == self.key
        return keep


def largest(scores: Mapping[str, Shard], counts: Mapping[str, int], ranks: Ranks) -> dict[str, Cut]:
    """Find the `counts[name]` elements of largest magnitude in each parameter (collective).

    Of equal magnitudes, those that come first in the flattened parameter are kept, so that exactly as many are kept as
    asked for, whatever the sharding. A NaN counts as larger than infinity, and -0.0 equals 0.0.

    Args:
        scores: This rank's scores by parameter name, float32 or narrower. Each element belongs to one rank; a rank
            without elements of a parameter may leave it out.
        counts: How many elements to keep, by name: the same names in the same order on all ranks. If a parameter has
            fewer elements with scores, all are kept.
        ranks: The ranks that share the elements.

    Returns:
        By the names in `counts`, the same on all ranks.
    """
    names = list(counts)
    if not names:
        return {}
    left = torch.tensor([counts[name] for name in names], dtype=torch.int64)
    none_P = left <= 0
    prefix_P = torch.zeros_like(left)  # the cut's upper bits, as far as they are known
    equal_P = torch.zeros_like(left)
    for shift in range(DIGIT * (PASSES - 1), -1, -DIGIT):
        # Count the next digit of the elements that share the prefix.
        histogram_PV = torch.zeros(len(names), 1 << DIGIT, dtype=torch.int64)
        for counted_V, name, prefix in zip(histogram_PV, names, prefix_P.tolist(), strict=True):
            for _, keys in _keys(scores.get(name)):
                if shift < DIGIT * (PASSES - 1):
                    keys = keys[(keys >> (shift + DIGIT)) == prefix]
                digits = (keys >> shift) & ((1 << DIGIT) - 1)
                counted_V += torch.bincount(digits, minlength=1 << DIGIT).cpu()
        # From the largest value down, the cut's digit is the first with which enough elements are kept.
        down_PV = ranks.total(histogram_PV).flip(1)
        sums_PV = down_PV.cumsum(1)
        left = torch.minimum(left, sums_PV[:, -1])
        place_P = (sums_PV < left[:, None]).sum(1, keepdim=True)
        equal_P = down_PV.gather(1, place_P)[:, 0]
        left = left - (sums_PV.gather(1, place_P)[:, 0] - equal_P)
        prefix_P = prefix_P << DIGIT | ((1 << DIGIT) - 1 - place_P[:, 0])
    stops = _stops(scores, names, prefix_P, left, equal_P, ranks)
    return {
        name: Cut(_NAN, 0) if none else Cut(key, stop)
        for name, key, stop, none in zip(names, prefix_P.tolist(), stops, none_P.tolist(), strict=True)
    }


def _stops(
    scores: Mapping[str, Shard],
    names: list[str],
    keys_P: torch.Tensor,
    wanted_P: torch.Tensor,
    equal_P: torch.Tensor,
    ranks: Ranks,
) -> list[int]:
    """For each parameter, one past the last element that is kept although it only equals the cut.

    Where all elements equal to the cut are kept, which is usual, nothing needs to be asked. Otherwise two small sums
    over the ranks find who holds the last one.
    """
    stops_P = torch.full_like(wanted_P, torch.iinfo(torch.int64).max)
    split = (wanted_P < equal_P).nonzero()[:, 0].tolist()
    if not split:
        return stops_P.tolist()
    # Where each rank's shard starts, and how many such elements it has.
    table_RS2 = torch.zeros(ranks.world, len(split), 2, dtype=torch.int64)
    for column, number in enumerate(split):
        shard = scores.get(names[number])
        if shard is not None:
            table_RS2[ranks.rank, column, 0] = shard.start
            for _, keys in _keys(shard):
                table_RS2[ranks.rank, column, 1] += int((keys == int(keys_P[number])).sum())
    table_RS2 = ranks.total(table_RS2)
    found_S = torch.zeros(len(split), dtype=torch.int64)
    for column, number in enumerate(split):
        starts_R, equal_R = table_RS2[:, column].unbind(1)
        start, own = table_RS2[ranks.rank, column].tolist()
        before = int(equal_R[starts_R < start].sum())
        wanted = int(wanted_P[number]) - before
        if 0 < wanted <= own:
            found_S[column] = _place(scores[names[number]], int(keys_P[number]), wanted)
    stops_P[split] = ranks.total(found_S)
    return stops_P.tolist()


def _place(shard: Shard, key: int, wanted: int) -> int:
    """One past the `wanted`-th (from 1) element of a shard whose magnitude is `key`, in the flattened parameter."""
    for start, keys in _keys(shard):
        places = (keys == key).nonzero()[:, 0]
        if wanted <= len(places):
            return shard.start + start + int(places[wanted - 1]) + 1
        wanted -= len(places)
    raise AssertionError("the shard has fewer such elements than it counted")


def _keys(shard: Shard | None) -> Iterator[tuple[int, torch.Tensor]]:
    """Magnitudes in chunks, as `(<= CHUNK,)` int32 of the same order, with each chunk's place in the shard."""
    if shard is not None:
        for number, chunk in enumerate(shard.data.detach().split(CHUNK)):
            yield number * CHUNK, chunk.float().abs().view(torch.int32).clamp_(max=_NAN)
