"""Every operation in a few lines of plain PyTorch, the way it is read in the papers.

These are what the tests compare with and what the benchmarks measure against. They take the same arguments as the
operations of the same names and run on any device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from cl_dist.kernels.rows import RowMask, counted_tokens

if TYPE_CHECKING:
    from cl_dist.kernels.adamw_rows import AdamWSettings, AdamWState, RowPiece


def row_magnitude(
    output: torch.Tensor, token_mask: torch.Tensor | None = None, *, per_token: bool = True
) -> torch.Tensor:
    """Sum absolute outputs over tokens (MIGU, arXiv 2406.17245, equations 3 and 4); see `kernels.row_magnitude`."""
    y = output.detach().reshape(-1, output.shape[-1]).abs().double()
    if token_mask is not None:
        y = y[counted_tokens(output, token_mask)]
    if per_token:
        norm = y.sum(dim=1, keepdim=True)
        y = torch.where(norm < torch.finfo(torch.float32).tiny, 0.0, y / norm)
    return y.sum(dim=0).float()


def topk_row_mask(magnitude: torch.Tensor, threshold: float) -> RowMask:
    """See `kernels.topk_row_mask`."""
    return topk_row_masks(magnitude, [magnitude.numel()], threshold)[0]


def topk_row_masks(magnitudes: torch.Tensor, sizes: Sequence[int], threshold: float) -> list[RowMask]:
    """Sort, and keep what is as large as the entry at index `ceil(T * (N - 1))`; see `kernels.topk_row_masks`."""
    masks = []
    for magnitude in magnitudes.split(list(sizes)):
        ascending = magnitude.sort().values  # NaN last
        cut = ascending[math.ceil(threshold * (magnitude.numel() - 1))]
        keep = magnitude.isnan() | (magnitude >= cut)
        masks.append(RowMask(keep, keep.nonzero().flatten()))
    return masks


def masked_weight_grad(
    input: torch.Tensor,
    grad_output: torch.Tensor,
    rows: torch.Tensor,
    weight_grad: torch.Tensor | None = None,
    bias_grad: torch.Tensor | None = None,
    *,
    bias: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Mask after backward: the whole gradient, then zero the rows that are not kept; see `kernels.masked_weight_grad`.

    A given gradient is added to, in place.
    """
    x = input.reshape(-1, input.shape[-1])
    dy = grad_output.reshape(-1, grad_output.shape[-1])
    keep = torch.zeros(dy.shape[1], dtype=torch.bool, device=dy.device)
    keep[rows] = True
    weight = torch.where(keep.unsqueeze(1), dy.t() @ x, 0)
    weight = weight if weight_grad is None else weight_grad.add_(weight)
    if not bias and bias_grad is None:
        return weight, None
    sums = torch.where(keep, dy.sum(dim=0), 0)
    return weight, sums if bias_grad is None else bias_grad.add_(sums)


def column_weight_grad(
    input: torch.Tensor, grad_output: torch.Tensor, columns: torch.Tensor | None = None, *, transposed: bool = False
) -> torch.Tensor:
    """Pick the columns out of the whole gradient; see `kernels.column_weight_grad`."""
    x = input.reshape(-1, input.shape[-1])
    dy = grad_output.reshape(-1, grad_output.shape[-1])
    weight = dy.t() @ x
    kept = weight if columns is None else weight[:, columns]
    return kept.t().contiguous() if transposed else kept


def apply_row_mask_(shard: torch.Tensor, start: int, row_length: int, keep: torch.Tensor) -> torch.Tensor:
    """Look up the row of every element; see `kernels.apply_row_mask_`."""
    row = torch.arange(start, start + shard.numel(), device=shard.device) // row_length
    return shard.masked_fill_(~keep[row], 0)


def adamw_rows_(state: AdamWState, step: torch.Tensor, pieces: Sequence[RowPiece], settings: AdamWSettings) -> None:
    """Save everything, step everything, put back what is not kept; see `kernels.adamw_rows_`."""
    before = [tensor.clone() for tensor in state]
    kept = torch.zeros(state.param.shape, dtype=torch.bool, device=state.param.device)
    for piece in pieces:
        kept[piece.offset : piece.offset + piece.numel] = piece.kept(piece.offset, piece.numel)
    torch._fused_adamw_(
        [state.param], [state.grad], [state.exp_avg], [state.exp_avg_sq], [], [step],
        lr=settings.lr, beta1=settings.beta1,
        beta2=settings.beta2, weight_decay=settings.weight_decay, eps=settings.eps, amsgrad=False, maximize=False,
    )  # fmt: skip
    for tensor, old in zip(state, before, strict=True):
        torch.where(kept, tensor, old, out=tensor)


def importance_update_(
    param: torch.Tensor,
    grad: torch.Tensor,
    smoothed: torch.Tensor,
    uncertainty: torch.Tensor,
    *,
    beta1: float = 0.85,
    beta2: float = 0.85,
    order: str = "mixed",
) -> None:
    """Chain of out-of-place tensor operations (KIF, arXiv 2408.05200); see `kernels.importance_update_`."""
    product = param * grad
    if order == "first":
        importance = product.abs()
    elif order == "second":
        importance = (product * product).abs()
    else:
        importance = (product - 0.5 * (product * product)).abs()
    smoothed.copy_(beta1 * smoothed + (1 - beta1) * importance)
    uncertainty.copy_(beta2 * uncertainty + (1 - beta2) * (importance - smoothed).abs())
