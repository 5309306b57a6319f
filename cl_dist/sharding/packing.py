"""Packs the kept rows of flat tensors into smaller ones, and puts them back: index arithmetic and copies.

A packed tensor has the elements that travel in the order in which they lie in the flat one: of a masked parameter those
of its kept rows, of any other parameter all of them, of padding none. So the packed form of a piece is a piece of the
packed form, wherever ZeRO cuts, and every rank can compute the sizes of all pieces from the mask alone.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from cl_dist.kernels import RowLayout


@dataclass(frozen=True)
class KeptRows:
    """The kept rows of one parameter."""

    name: str
    layout: RowLayout
    rows: npt.NDArray[np.int64]
    """Ascending."""
    index: torch.Tensor
    """`(kept,)` int64: the same on the parameter's device."""

    def before(self, element: int) -> int:
        """How many of the first `element` elements of the flattened parameter are in kept rows."""
        _, rows, length, columns = self.layout
        if not columns:
            row, inside = divmod(element, length)
            kept = int(np.searchsorted(self.rows, row))
            return kept * length + (inside if kept < len(self.rows) and self.rows[kept] == row else 0)
        matrix, rest = divmod(element, rows * length)
        line, column = divmod(rest, rows)
        first = matrix * rows
        begin, here, end = np.searchsorted(self.rows, (first, first + column, first + rows)).tolist()
        return int(begin * length + line * (end - begin) + here - begin)

    def runs(self, piece: torch.Tensor, start: int) -> Iterator[tuple[torch.Tensor, int, torch.Tensor]]:
        """Split a piece of the flattened parameter, which begins with its element `start`, into runs of rows.

        Yields:
            A view of the stored matrix, the dimension of it that counts rows, and which of them are kept.
        """
        for segment in self.layout.segments(start, piece.numel()):
            view = segment.view(piece)
            bounds = (segment.row, segment.row + segment.rows)
            begin, end = np.searchsorted(self.rows, bounds).tolist()
            index = self.index[begin:end]
            if segment.row:
                index = index - segment.row
            yield (view.t() if segment.columns else view), int(segment.columns), index


class _Part(NamedTuple):
    """Where a parameter and a piece of a flat tensor overlap."""

    place: int
    """First element in the piece."""
    start: int
    """First element in the flattened parameter."""
    numel: int
    kept: KeptRows | None


class Packing:
    """How a flat tensor is packed.

    Args:
        parameters: For each parameter in the flat tensor where it begins, its elements, and its kept rows; None: all
            of it travels. In ascending order; elements between them do not travel.
    """

    def __init__(self, parameters: Iterable[tuple[int, int, KeptRows | None]]) -> None:
        self._parameters = list(parameters)
        self._starts = [start for start, _, _ in self._parameters]

    @staticmethod
    def in_a_row(parameters: Iterable[tuple[int, KeptRows | None]]) -> Packing:
        """Of parameters one right after the other: elements, and kept rows."""
        found, start = [], 0
        for numel, kept in parameters:
            found.append((start, numel, kept))
            start += numel
        return Packing(found)

    def masked(self, flat: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the masked parameters in the flat tensor, dropped rows included: name, and elements."""
        for start, numel, kept in self._parameters:
            if kept is not None:
                yield kept.name, flat.narrow(0, start, numel)

    def _parts(self, start: int, stop: int) -> Iterator[_Part]:
        """Yield what lies in the elements `[start, stop)` of the flat tensor."""
        for begin, numel, kept in self._parameters[max(0, bisect_right(self._starts, start) - 1) :]:
            if begin >= stop:
                return
            first, last = max(begin, start), min(begin + numel, stop)
            if first < last:
                yield _Part(first - start, first - begin, last - first, kept)

    def size(self, start: int, stop: int) -> int:
        """Elements of `[start, stop)` that travel."""
        return sum(_size(part) for part in self._parts(start, stop))

    def take(self, piece: torch.Tensor, start: int) -> torch.Tensor:
        """Pack a piece of the flat tensor that begins with its element `start`: `(elements,)` each."""
        packed = piece.new_empty(self.size(start, start + piece.numel()))
        for inside, kept, part in self._pairs(packed, piece, start):
            if kept is None:
                part.copy_(inside)
                continue
            matrix, rows, index, shape = kept
            torch.index_select(matrix, rows, index, out=part.view(shape))
        return packed

    def put(self, packed: torch.Tensor, piece: torch.Tensor, start: int, zero_dropped: bool) -> None:
        """The reverse: overwrite the kept rows of `piece`. The others become zero, or stay."""
        for inside, kept, part in self._pairs(packed, piece, start):
            if kept is None:
                inside.copy_(part)
                continue
            matrix, rows, index, shape = kept
            if zero_dropped:
                matrix.zero_()
            matrix.index_copy_(rows, index, part.view(shape))

    def add(self, packed: torch.Tensor, piece: torch.Tensor, start: int) -> None:
        """Add to the kept rows of `piece`."""
        for inside, kept, part in self._pairs(packed, piece, start):
            if kept is None:
                inside.add_(part)
                continue
            matrix, rows, index, shape = kept
            matrix.index_add_(rows, index, part.view(shape))

    def _pairs(
        self, packed: torch.Tensor, piece: torch.Tensor, start: int
    ) -> Iterator[tuple[torch.Tensor, tuple[torch.Tensor, int, torch.Tensor, tuple[int, int]] | None, torch.Tensor]]:
        """Yield each run of `piece` with its part of `packed`; of a masked parameter also as (stored matrix, dimension
        of its rows, kept rows, shape of the packed part).
        """
        at = 0
        for part in self._parts(start, start + piece.numel()):
            inside = piece.narrow(0, part.place, part.numel)
            if part.kept is None:
                yield inside, None, packed.narrow(0, at, part.numel)
                at += part.numel
                continue
            for matrix, rows, index in part.kept.runs(inside, part.start):
                shape = (len(index), matrix.shape[1]) if rows == 0 else (matrix.shape[0], len(index))
                yield inside, (matrix, rows, index, shape), packed.narrow(0, at, shape[0] * shape[1])
                at += shape[0] * shape[1]


def _size(part: _Part) -> int:
    if part.kept is None:
        return part.numel
    return part.kept.before(part.start + part.numel) - part.kept.before(part.start)
