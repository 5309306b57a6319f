"""Index arithmetic that the operations share: which rows of a matrix does a piece of the flattened matrix hold?

ZeRO cuts a model's flattened parameters at arbitrary places, so that the first and last row of a rank's piece may be
partial. `row_segments` answers with plain integers and allocates nothing. `RowLayout` extends it to weights that are
stored transposed, and to several matrices in one parameter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch


class RowMask(NamedTuple):
    """The kept rows of one layer, in the two forms that kernels read."""

    keep: torch.Tensor
    """`(rows,)` bool, True where a row is kept."""
    rows: torch.Tensor
    """`(kept,)` int64, ascending: the rows where `keep` is True."""


class RowMasks(NamedTuple):
    """The kept rows of many layers in flat tensors, one layer after the other."""

    keep: torch.Tensor
    """`(total,)` bool, True where a row is kept."""
    rows: torch.Tensor
    """`(total,)` int64: from where a layer begins, its kept rows, ascending; what follows them means nothing."""
    counts: torch.Tensor
    """`(layers,)` int64: the kept rows of each layer."""

    def split(self, sizes: Sequence[int], counts: Sequence[int]) -> list[RowMask]:
        """Return every layer's mask, as views; `counts` are numbers on the host, for which it waited once."""
        pieces = zip(self.keep.split(list(sizes)), self.rows.split(list(sizes)), counts, strict=True)
        return [RowMask(keep_N, rows_N[:count]) for keep_N, rows_N, count in pieces]


class RowSegment(NamedTuple):
    """A run of rows inside a flat piece, all of the same width (a partial row is a segment of one row)."""

    row: int
    """First row of the matrix in this segment."""
    rows: int
    """Number of rows."""
    offset: int
    """Where the segment starts in the flat piece, in elements."""
    width: int
    """Elements per row: the row length, or less for a partial first or last row."""
    columns: bool = False
    """Whether the weight is stored transposed: neighbouring elements of the piece belong to neighbouring rows."""

    def view(self, flat: torch.Tensor) -> torch.Tensor:
        """Return the segment of `flat` (1-D, any dtype) as a `(rows, width)` view."""
        piece = flat.narrow(0, self.offset, self.rows * self.width)
        return piece.view(self.width, self.rows).t() if self.columns else piece.view(self.rows, self.width)


class RowLayout(NamedTuple):
    """How a flattened parameter stores the rows of a weight.

    The weight consists of `matrices` matrices one after the other (the experts of a mixture; otherwise one). Each is
    stored as `(rows, length)`, or with `columns` as `(length, rows)`: row j is then column j of what is stored. Row j
    of matrix m has number `m * rows + j`.
    """

    matrices: int
    rows: int
    """Rows of each matrix."""
    length: int
    """Elements of each row (1: a bias)."""
    columns: bool = False

    @property
    def total(self) -> int:
        """Rows of all matrices."""
        return self.matrices * self.rows

    def segments(self, start: int, numel: int) -> list[RowSegment]:
        """Split elements `[start, start + numel)` of the flattened parameter into runs of rows.

        Raises:
            ValueError: A number is negative, or the piece ends behind the parameter.
        """
        if start + numel > self.total * self.length:
            raise ValueError(f"[{start}, {start + numel}) ends behind {self.total} rows of {self.length}")
        if not self.columns:
            return row_segments(start, numel, self.length)
        return list(self._column_segments(start, numel))

    def _column_segments(self, start: int, numel: int) -> Iterator[RowSegment]:
        """Yield the stored lines, partial ones at the ends, split where a matrix ends."""
        size = self.rows * self.length
        for line in row_segments(start, numel, self.rows):
            place = start + line.offset  # in the parameter
            stop = place + line.rows * line.width
            while place < stop:
                matrix, inside = divmod(place, size)
                here = min(stop, (matrix + 1) * size) - place
                yield RowSegment(
                    row=matrix * self.rows + inside % self.rows,
                    rows=line.width,
                    offset=place - start,
                    width=here // line.width,
                    columns=True,
                )
                place += here


def counted_tokens(output: torch.Tensor, token_mask: torch.Tensor) -> torch.Tensor:
    """Return `token_mask` as `(tokens,)` bool for the flattened tokens of `output`.

    Args:
        output: `(..., features)`.
        token_mask: bool, one entry per token in any shape, or broadcastable to the leading shape of `output`.
    """
    if token_mask.numel() * output.shape[-1] != output.numel():
        token_mask = token_mask.expand(output.shape[:-1])
    return token_mask.reshape(-1)


def row_segments(start: int, numel: int, row_length: int) -> list[RowSegment]:
    """Split elements `[start, start + numel)` of a flattened matrix into at most three runs of rows.

    Args:
        start: First element of the piece, counted in the flattened matrix.
        numel: Elements in the piece; 0 gives no segment.
        row_length: Elements of a whole row (`in_features` of a linear layer's weight; 1 for a bias).

    Raises:
        ValueError: A number is negative, or the row length is below one.
    """
    if start < 0 or numel < 0 or row_length < 1:
        raise ValueError(f"no such piece: start {start}, numel {numel}, row length {row_length}")
    return list(_segments(start, start + numel, row_length))


def _segments(start: int, stop: int, row_length: int) -> Iterator[RowSegment]:
    # At most three runs: the rest of a row that begins earlier, whole rows, the beginning of one that ends later.
    first = start
    row, inside = divmod(start, row_length)
    if inside and start < stop:
        width = min(row_length - inside, stop - start)
        yield RowSegment(row, 1, 0, width)
        row, start = row + 1, start + width
    whole = (stop - start) // row_length
    if whole > 0:
        yield RowSegment(row, whole, start - first, row_length)
        row, start = row + whole, start + whole * row_length
    if start < stop:
        yield RowSegment(row, 1, start - first, stop - start)
