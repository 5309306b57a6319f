"""Which rows are kept: those whose magnitude reaches the quantile."""

from __future__ import annotations

import math

import torch


def kept_rows(rows: int, threshold: float) -> int:
    """Number of rows kept when no two magnitudes are equal: `N - ceil(T * (N - 1))`."""
    return rows - math.ceil(threshold * (rows - 1))


def topk_row_mask(magnitude: torch.Tensor, threshold: float) -> torch.Tensor:
    """Keep the rows with `magnitude >= quantile(magnitude, threshold)`, ties at the threshold included.

    The quantile interpolates linearly, so a row reaches it exactly when it is at least as large as the entry at index
    `ceil(T * (N - 1))` of the ascending order (MIGU, arXiv 2406.17245, section 3.2).

    Args:
        magnitude: `(rows,)`, floating, rows >= 1.
        threshold: T in [0, 1).

    Returns:
        `(rows,)` bool. All rows when all magnitudes are equal.
    """
    rank = math.ceil(threshold * (magnitude.numel() - 1)) + 1
    return magnitude >= magnitude.kthvalue(rank).values
