"""Zeroes the rows of a flat shard that a mask drops."""

from __future__ import annotations

import math

import numba
import numpy as np
import numpy.typing as npt
import torch

from cl_dist.kernels import reference
from cl_dist.kernels.backend import Launch, blocks, cpu_jit, jit, path_of, tl
from cl_dist.kernels.rows import RowLayout

BLOCK = 2048
"""Elements of the shard that a GPU program covers."""


def apply_row_mask_(shard: torch.Tensor, start: int, row_length: int, keep: torch.Tensor) -> torch.Tensor:
    """Zero, in place, every element of `shard` whose row is dropped (MIGU, arXiv 2406.17245, section 3.2).

    Kept rows are neither read nor written.

    Args:
        shard: `(numel,)`, any floating dtype: elements `[start, start + numel)` of a flattened `(rows, row_length)`
            matrix. It may start and end inside a row.
        start: Position of the shard's first element in the flattened matrix.
        row_length: Elements per row.
        keep: `(rows,)` bool on the shard's device; True keeps a row. In a dropped row NaN and Inf become zero too.

    Returns:
        `shard`.

    Raises:
        ValueError: The shard ends after the last row of the mask, `start` is negative, or `row_length` is below one.
    """
    if start < 0 or row_length < 1:
        raise ValueError(f"no such piece: start {start}, row length {row_length}")
    if start + shard.numel() > keep.numel() * row_length:
        raise ValueError(f"shard [{start}, {start + shard.numel()}) is longer than {keep.numel()} rows of {row_length}")
    path = path_of(shard) if shard.is_contiguous() else "torch"
    if path == "torch":
        reference.apply_row_mask_(shard, start, row_length, keep)
    elif path == "cpu":
        _on_cpu(shard, start, row_length, keep)
    else:
        _launch(shard, start, row_length, keep).run()
    return shard


def mask_rows_(shard: torch.Tensor, start: int, layout: RowLayout, keep: torch.Tensor) -> torch.Tensor:
    """Zero dropped rows as `apply_row_mask_` does, for rows in any `layout`, columns included.

    Args:
        shard: `(numel,)`, any floating dtype: elements `[start, start + numel)` of the flattened parameter.
        start: Position of the shard's first element in it.
        layout: How the parameter stores its rows.
        keep: `(layout.total,)` bool on the shard's device; True keeps a row.

    Returns:
        `shard`.
    """
    if not layout.columns:
        return apply_row_mask_(shard, start, layout.length, keep)
    for segment in layout.segments(start, shard.numel()):
        dropped = ~keep.narrow(0, segment.row, segment.rows)
        segment.view(shard).masked_fill_(dropped.unsqueeze(1), 0)
    return shard


def _on_cpu(shard: torch.Tensor, start: int, row_length: int, keep: torch.Tensor) -> None:
    size = shard.element_size()
    data = shard.detach().view(torch.uint8).numpy()
    _zero_rows.sized(shard.numel())(data, start * size, row_length * size, keep.contiguous().numpy())


@cpu_jit
def _zero_rows(data: npt.NDArray[np.uint8], start: int, row_bytes: int, keep: npt.NDArray[np.bool_]) -> None:
    """Zero the bytes of dropped rows; in every floating dtype, zero is all zero bits."""
    first = start // row_bytes
    for n in numba.prange((start + data.size + row_bytes - 1) // row_bytes - first):
        if not keep[first + n]:
            row = (first + n) * row_bytes - start  # negative for a first row that begins before the shard
            data[max(row, 0) : min(row + row_bytes, data.size)] = 0


def _launch(shard: torch.Tensor, start: int, row_length: int, keep: torch.Tensor) -> Launch:
    """Let each program cover a piece of the shard, not a row, so that its addresses are aligned wherever rows begin.

    If every row begins and ends at a multiple of 16 bytes of the shard, the kernel writes 16 bytes at once.
    """
    group = math.gcd(max(1, 16 // shard.element_size()), start, row_length, shard.numel())
    arguments = {
        "shard": shard,
        "keep": keep.contiguous().view(torch.uint8),
        "start": start,
        "numel": shard.numel(),
        "row_length": row_length,
        "GROUPS": BLOCK // group,
        "GROUP": group,
    }
    return Launch(_zero_dropped, (blocks(shard.numel(), BLOCK),), arguments, num_warps=4)


@jit
def _zero_dropped(
    shard: tl.tensor,
    keep: tl.tensor,
    start: tl.tensor,
    numel: tl.tensor,
    row_length: tl.tensor,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
) -> None:
    """Write zeros where the row is dropped; all elements of a group belong to one row."""
    piece = tl.program_id(0).to(tl.int64) * (GROUPS * GROUP)
    first = piece + start
    row = first // row_length
    inside = (first % row_length).to(tl.int32)  # the divisions that follow fit in 32 bits, which is faster
    i_G1 = (tl.arange(0, GROUPS) * GROUP)[:, None]
    exists_G1 = piece + i_G1 < numel
    kept_G1 = tl.load(keep + row + (inside + i_G1) // row_length, mask=exists_G1, other=1)
    i_GE = i_G1 + tl.arange(0, GROUP)[None, :]
    drop_GE = tl.broadcast_to(exists_G1 & (kept_G1 == 0), (GROUPS, GROUP))
    tl.store(shard + piece + i_GE, tl.zeros((GROUPS, GROUP), shard.dtype.element_ty), mask=drop_GE)
