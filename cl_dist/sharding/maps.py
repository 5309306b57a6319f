"""Which elements of each parameter a rank owns, as plain arithmetic: for any number of ranks, without an engine.

`layouts.py` views the same pieces in a live engine. The arithmetic is that of deepspeed 0.19.8:

- stage 0: every rank owns everything;
- stages 1 and 2 (`stage_1_and_2.py`: `flatten_dense_tensors_aligned`, `get_data_parallel_partitions`): the parameters
  of an optimiser group lie one after the other in one flat tensor, which is padded at its end to a multiple of
  2 x ranks and cut into one piece per rank. With `parameter_alignment`, each parameter but the last is padded to 16
  bytes;
- stage 3 (`partition_parameters.py`: `_partition_param`): each parameter is padded to a multiple of the ranks and cut
  by itself. The pieces of a group lie one after the other in sub-groups: a sub-group is full once it has
  `sub_group_size` elements (`stage3.py`: `_create_fp16_sub_groups`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

START_ALIGNMENT = 2
"""DeepSpeed's `nccl_start_alignment_factor`, in elements per rank."""
PARAMETER_ALIGNMENT_BYTES = 16
SUB_GROUP_SIZE = 10**9
"""DeepSpeed's default."""


class Piece(NamedTuple):
    """The part of one parameter that a rank owns."""

    flat: int
    """Number of the flat tensor that holds it."""
    offset: int
    """First element in that tensor."""
    start: int
    """First element in the flattened parameter."""
    numel: int
    """Elements, at least one."""

    @property
    def stop(self) -> int:
        """One past the last element in the flattened parameter."""
        return self.start + self.numel


def padded_piece(numel: int, ranks: int) -> int:
    """Elements of a rank's piece of a stage 3 parameter, including the padding at the parameter's end."""
    return -(-numel // ranks)


def owned_piece(numel: int, piece: int, rank: int) -> tuple[int, int]:
    """(start, elements) of a rank's part of `numel` elements that are cut into pieces of `piece`, without padding."""
    start = piece * rank
    return start, max(0, min(piece, numel - start))


def even_share(numel: int, rank: int, ranks: int) -> tuple[int, int]:
    """[start, stop) of a rank's even share, possibly empty, of elements that every rank holds."""
    return numel * rank // ranks, numel * (rank + 1) // ranks


@dataclass(frozen=True)
class ShardMap:
    """The pieces of all trained parameters on all ranks.

    Args:
        groups: The optimiser's parameter groups: elements by parameter name, in the optimiser's order.
        stage: ZeRO stage.
        ranks: Number of ranks.
        parameter_alignment: Elements that each parameter is padded to at stages 1 and 2; 1: no padding.
        sub_group_size: DeepSpeed's setting, for stage 3.
    """

    groups: Sequence[Mapping[str, int]]
    stage: int
    ranks: int
    parameter_alignment: int = 1
    sub_group_size: int = SUB_GROUP_SIZE

    @cached_property
    def numels(self) -> dict[str, int]:
        """Elements of each parameter by name. Like DeepSpeed's optimiser, leaves empty parameters out."""
        return {name: numel for group in self.groups for name, numel in group.items() if numel}

    @cached_property
    def flat_groups(self) -> list[dict[str, int]]:
        """The flat tensors: for each, the elements that a parameter takes up, by name, with a parameter's padding.

        Stages 1 and 2 have one flat tensor per group, cut over the ranks; stage 3 has one per sub-group, which holds
        this rank's pieces; stage 0 has one per parameter.
        """
        groups = [{name: numel for name, numel in group.items() if numel} for group in self.groups]
        groups = [group for group in groups if group]
        if self.stage == 0:
            return [{name: numel} for group in groups for name, numel in group.items()]
        if self.stage == 3:
            pieces = ({name: padded_piece(numel, self.ranks) for name, numel in group.items()} for group in groups)
            return [sub_group for group in pieces for sub_group in self._sub_groups(group)]
        for group in groups:
            for name in list(group)[:-1]:
                group[name] += -group[name] % self.parameter_alignment
        return groups

    def _sub_groups(self, pieces: Mapping[str, int]) -> Iterator[dict[str, int]]:
        if self.sub_group_size >= sum(pieces.values()):
            yield dict(pieces)
            return
        current: dict[str, int] = {}
        for name, piece in pieces.items():
            current[name] = piece
            if sum(current.values()) >= self.sub_group_size:
                yield current
                current = {}
        if current:
            yield current

    @cached_property
    def flat_numels(self) -> list[int]:
        """Elements of each flat tensor on one rank, with padding; the same on all ranks."""
        totals = [sum(group.values()) for group in self.flat_groups]
        if self.stage in (0, 3):
            return totals
        alignment = START_ALIGNMENT * self.ranks
        return [math.ceil(total / alignment) * alignment // self.ranks for total in totals]

    @property
    def padding(self) -> int:
        """Elements of padding, on all ranks together."""
        copies = 1 if self.stage == 0 else self.ranks
        return copies * sum(self.flat_numels) - sum(self.numels.values())

    def owned(self, rank: int) -> dict[str, Piece]:
        """What a rank owns, by parameter name, in the order of the groups. Parameters that it owns nothing of are
        missing.
        """
        pieces = {}
        for flat, group in enumerate(self.flat_groups):
            offset = 0
            # At stages 1 and 2 the rank's part of the flat tensor starts here; elsewhere it is the whole tensor.
            first = self.flat_numels[flat] * rank if self.stage in (1, 2) else 0
            last = first + self.flat_numels[flat]
            for name, size in group.items():
                numel = self.numels[name]
                if self.stage == 0:
                    pieces[name] = Piece(flat, 0, 0, numel)
                elif self.stage == 3:
                    start, owned = owned_piece(numel, size, rank)
                    if owned:
                        pieces[name] = Piece(flat, offset, start, owned)
                else:
                    begin, end = max(offset, first), min(offset + numel, last)
                    if begin < end:
                        pieces[name] = Piece(flat, begin - first, begin - offset, end - begin)
                offset += size
        return pieces
