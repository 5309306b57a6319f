"""Zero the rows of a flat shard that a mask does not keep."""

from __future__ import annotations

import torch
from cl_dist.kernels.rows import row_segments


def apply_row_mask_(shard: torch.Tensor, start: int, row_length: int, keep: torch.Tensor) -> torch.Tensor:
    """Zero, in place, every element of `shard` whose row is not kept (MIGU, arXiv 2406.17245, section 3.2).

    Args:
        shard: `(numel,)`, any floating dtype: elements `[start, start + numel)` of a flattened `(rows, row_length)`
            matrix.
        start: Position of the shard's first element in the flattened matrix.
        row_length: Elements per row.
        keep: `(rows,)` bool on the shard's device; True keeps a row. NaN and Inf in a row that is not kept become zero
            too.

    Returns:
        `shard`.

    Raises:
        ValueError: The shard reaches past the last row of the mask.
    """
    if start + shard.numel() > keep.numel() * row_length:
        raise ValueError(f"shard [{start}, {start + shard.numel()}) is longer than {keep.numel()} rows of {row_length}")
    for segment in row_segments(start, shard.numel(), row_length):
        dropped = ~keep.narrow(0, segment.row, segment.rows)
        segment.view(shard).masked_fill_(dropped.unsqueeze(1), 0)
    return shard
