"""Computes the weight gradient of a linear layer for the kept columns only: the mirror of `masked_weight_grad`."""

from __future__ import annotations

import math

import torch

from cl_dist.kernels import weight_grad_on_gpu as gpu
from cl_dist.kernels.backend import path_of

GATHER_COST = 64
"""Copying one column of the input costs as much as multiplying it with this many output features: the same copy as that
of a column of `grad_output` in `masked_weight_grad`, where it was measured."""


@torch.no_grad()
def column_weight_grad(
    input: torch.Tensor,
    grad_output: torch.Tensor,
    columns: torch.Tensor | None = None,
    *,
    transposed: bool = False,
) -> torch.Tensor:
    """Compute `dW[:, columns] = dY^T X[:, columns]` of a linear layer as a matrix of its kept columns alone.

    It equals these columns of the dense gradient, up to rounding from a different order of additions. Repeated calls
    give the same bits. What the other columns of the input hold, NaN or Inf too, has no effect.

    Give the whole input where it is in memory anyway: on a GPU, a layer with few outputs reads the kept columns in
    place, and others copy them in one launch. A layer that has saved only X[:, columns] for backward, to save memory
    between forward and backward, gives that and no columns.

    Args:
        input: `(..., in_features)`, floating: the layer's input X, any strides; without `columns`, X[:, columns].
        grad_output: `(..., out_features)`, same leading shape and dtype: the gradient dY of the layer's output.
        columns: `(kept,)` int64, strictly ascending, in `[0, in_features)`: the kept columns of the weight. Not checked
            on a GPU. None: those of the input are the kept ones.
        transposed: Return the transpose, for layers that store it (transformers' `Conv1D`).

    Returns:
        `(out_features, kept)`, contiguous, in the input's dtype; transposed `(kept, out_features)`.

    Raises:
        ValueError: Shapes, dtypes or devices do not match.
    """
    _check(input, grad_output, columns)
    tokens = math.prod(input.shape[:-1])
    x_TI, dy_TO = input.reshape(tokens, input.shape[-1]), grad_output.reshape(tokens, grad_output.shape[-1])
    in_features, out_features = x_TI.shape[1], dy_TO.shape[1]
    if columns is None or columns.numel() == in_features:
        return _product(x_TI, dy_TO, transposed)
    kept = columns.numel()
    if _has_gpu_kernels(x_TI):
        if 0 in (kept, out_features):
            return x_TI.new_zeros((kept, out_features) if transposed else (out_features, kept))
        return gpu.COLUMN_WAYS[gpu.column_way_for(out_features)](x_TI, dy_TO, columns, transposed)
    # Copying the columns costs more than multiplying the dropped ones if there are few outputs or few dropped ones.
    if (in_features - kept) * out_features < GATHER_COST * kept:
        return _product(x_TI, dy_TO, transposed).index_select(0 if transposed else 1, columns)
    return _product(x_TI.index_select(1, columns), dy_TO, transposed)


def column_weight_grad_ways(input: torch.Tensor) -> dict[str, gpu.ColumnWay]:
    """Return every way to compute the kept columns from this whole input on its device, by name.

    `column_weight_grad` takes the one that `column_weight_grad_way` names; benchmarks and tests compare them.

    Args:
        input: `(tokens, in_features)`, floating.

    Returns:
        Functions of input, grad_output `(tokens, out_features)`, columns (at least one) and whether to transpose.
    """
    if not _has_gpu_kernels(input):
        return {"torch": lambda x_TI, dy_TO, columns, transposed: column_weight_grad(
            x_TI, dy_TO, columns, transposed=transposed
        )}  # fmt: skip
    return dict(gpu.COLUMN_WAYS)


def column_weight_grad_way(input: torch.Tensor, out_features: int) -> str:
    """Name the way that `column_weight_grad` takes for a layer with this many outputs."""
    return gpu.column_way_for(out_features) if _has_gpu_kernels(input) else "torch"


def _product(x_TK: torch.Tensor, dy_TO: torch.Tensor, transposed: bool) -> torch.Tensor:
    return x_TK.t() @ dy_TO if transposed else dy_TO.t() @ x_TK


def _has_gpu_kernels(tensor: torch.Tensor) -> bool:
    return path_of(tensor) == "triton" and tensor.dtype != torch.float64


def _check(input: torch.Tensor, grad_output: torch.Tensor, columns: torch.Tensor | None) -> None:
    if input.dim() == 0 or input.shape[:-1] != grad_output.shape[:-1] or input.dim() != grad_output.dim():
        raise ValueError(
            f"input {tuple(input.shape)} and grad_output {tuple(grad_output.shape)} do not have the same tokens"
        )
    if input.dtype != grad_output.dtype or not input.is_floating_point():
        raise ValueError(f"input {input.dtype} and grad_output {grad_output.dtype} must have one floating dtype")
    if columns is not None and (columns.dim() != 1 or columns.dtype != torch.int64):
        raise ValueError(f"columns must be (kept,) int64, not {tuple(columns.shape)} {columns.dtype}")
    if columns is not None and columns.numel() > input.shape[-1]:
        raise ValueError(f"{columns.numel()} columns were given, but the input has {input.shape[-1]}")
    if any(each is not None and each.device != input.device for each in (grad_output, columns)):
        raise ValueError(f"all tensors must be on {input.device}, the device of the input")
