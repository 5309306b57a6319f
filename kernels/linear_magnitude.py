"""A linear layer whose epilogue adds up the row magnitudes of its output, while the output is still in registers.

Nothing uses this by default: it replaces the vendor's matrix product by one in Triton, and whether what it saves (one
read of Y without per-token normalisation; with it, only the tokens' sums come for free and Y is still read once) pays
for that has not been measured on a GPU.
"""

from __future__ import annotations

import torch

from cl_dist.kernels.backend import Launch, blocks, jit, path_of, tl
from cl_dist.kernels.masked_weight_grad import _interpreted, _precision
from cl_dist.kernels.row_magnitude import SMALLEST_NORM, TOKEN_BLOCK, _fold_launch, _tile_of, _weights, row_magnitude
from cl_dist.kernels.rows import counted_tokens

TILE_TOKENS, TILE_ROWS, TILE_INNER = 64, 128, 32
"""Tokens, rows and input features of a program's tile."""
COLUMNS = 256
"""Rows that a program of the normalising pass adds up."""


@torch.no_grad()
def linear_magnitude(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    token_mask: torch.Tensor | None = None,
    *,
    per_token: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `Y = X W^T (+ b)` and `row_magnitude(Y)` (MIGU, arXiv 2406.17245, equations 3 and 4). No gradient flows.

    Args:
        input: `(..., in_features)`, float32, bfloat16 or float16, any strides.
        weight: `(out_features, in_features)`, same dtype and device.
        bias: `(out_features,)`, same dtype and device, or None.
        token_mask: As for `row_magnitude`.
        per_token: As for `row_magnitude`.

    Returns:
        The output, `(..., out_features)` of the input's dtype, and the magnitudes, `(out_features,)` float32.

    Raises:
        ValueError: Shapes that do not go together.
    """
    if input.shape[-1] != weight.shape[1] or (bias is not None and bias.shape != weight.shape[:1]):
        raise ValueError(f"no linear layer: input {tuple(input.shape)}, weight {tuple(weight.shape)}")
    if path_of(input) != "triton":
        output = torch.nn.functional.linear(input, weight, bias)
        return output, row_magnitude(output, token_mask, per_token=per_token)
    output = input.new_empty(*input.shape[:-1], weight.shape[0])
    counted_T = None if token_mask is None else counted_tokens(output, token_mask)
    x_TI, y_TO = input.reshape(-1, input.shape[-1]), output.view(-1, output.shape[-1])
    return output, _on_gpu(x_TI, weight, bias, counted_T, y_TO, per_token)


def _on_gpu(
    x_TI: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    counted_T: torch.Tensor | None,
    y_TO: torch.Tensor,
    per_token: bool,
) -> torch.Tensor:
    tokens, rows = y_TO.shape
    shape = (blocks(rows, TILE_ROWS), tokens) if per_token else (blocks(tokens, TILE_TOKENS), rows)
    partial = y_TO.new_empty(shape, dtype=torch.float32)
    total_O = y_TO.new_empty(rows, dtype=torch.float32)
    _linear_launch(x_TI, weight, bias, counted_T, y_TO, partial, per_token).run()
    if per_token:
        norms_NT = partial
        partial = y_TO.new_empty((blocks(tokens, TOKEN_BLOCK), rows), dtype=torch.float32)
        _normalise_launch(y_TO, counted_T, norms_NT, partial).run()
    _fold_launch(partial, total_O).run()
    return total_O


def _bytes(mask: torch.Tensor | None, otherwise: torch.Tensor) -> torch.Tensor:
    return otherwise if mask is None else mask.contiguous().view(torch.uint8)


def _linear_launch(
    x_TI: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    counted_T: torch.Tensor | None,
    y_TO: torch.Tensor,
    partial: torch.Tensor,
    per_token: bool,
) -> Launch:
    tokens, rows = y_TO.shape
    arguments = {
        "x": x_TI,
        "weight": weight,
        "bias": y_TO if bias is None else bias.contiguous(),
        "counted": _bytes(counted_T, y_TO),
        "y": y_TO,
        "partial": partial,
        "tokens": tokens,
        "rows": rows,
        "inner": x_TI.shape[1],
        "x_stride_t": x_TI.stride(0),
        "x_stride_i": x_TI.stride(1),
        "weight_stride_o": weight.stride(0),
        "weight_stride_i": weight.stride(1),
        "BIAS": bias is not None,
        "MASKED": counted_T is not None,
        "PER_TOKEN": per_token,
        "PRECISION": _precision(x_TI.dtype),
        "WIDEN": x_TI.dtype == torch.bfloat16 and _interpreted(),
        "TOKENS": TILE_TOKENS,
        "ROWS": TILE_ROWS,
        "INNER": TILE_INNER,
    }
    grid = (blocks(tokens, TILE_TOKENS), blocks(rows, TILE_ROWS))
    return Launch(_linear_kernel, grid, arguments, num_warps=8, num_stages=3)


def _normalise_launch(
    y_TO: torch.Tensor, counted_T: torch.Tensor | None, norms_NT: torch.Tensor, partial_BO: torch.Tensor
) -> Launch:
    tokens, rows = y_TO.shape
    arguments = {
        "y": y_TO,
        "counted": _bytes(counted_T, y_TO),
        "norms": norms_NT,
        "partial": partial_BO,
        "tokens": tokens,
        "rows": rows,
        "parts": norms_NT.shape[0],
        "token_stride": y_TO.stride(0),
        "row_stride": y_TO.stride(1),
        "SMALLEST": SMALLEST_NORM,
        "MASKED": counted_T is not None,
        "TOKENS": TOKEN_BLOCK,
        "COLUMNS": COLUMNS,
    }
    return Launch(_normalise_kernel, (len(partial_BO), blocks(rows, COLUMNS)), arguments, num_warps=8)


@jit
def _linear_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    counted: tl.tensor,
    y: tl.tensor,
    partial: tl.tensor,
    tokens: tl.tensor,
    rows: tl.tensor,
    inner: tl.tensor,
    x_stride_t: tl.tensor,
    x_stride_i: tl.tensor,
    weight_stride_o: tl.tensor,
    weight_stride_i: tl.tensor,
    BIAS: tl.constexpr,
    MASKED: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    INNER: tl.constexpr,
) -> None:
    """One tile of Y, and its sums over rows (PER_TOKEN) or over counted tokens, of the numbers that Y holds."""
    token_block, row_block = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    t_T = token_block * TOKENS + tl.arange(0, TOKENS)
    o_O = row_block * ROWS + tl.arange(0, ROWS)
    y_TO = tl.zeros((TOKENS, ROWS), tl.float32)
    for start in range(0, inner, INNER):
        i_I = start + tl.arange(0, INNER).to(tl.int64)
        x_TI = tl.load(
            x + t_T[:, None] * x_stride_t + i_I[None, :] * x_stride_i,
            mask=(t_T < tokens)[:, None] & (i_I < inner)[None, :],
            other=0.0,
        )
        weight_IO = tl.load(
            weight + o_O[None, :] * weight_stride_o + i_I[:, None] * weight_stride_i,
            mask=(o_O < rows)[None, :] & (i_I < inner)[:, None],
            other=0.0,
        )
        if WIDEN:
            x_TI, weight_IO = x_TI.to(tl.float32), weight_IO.to(tl.float32)
        y_TO = tl.dot(x_TI, weight_IO, y_TO, input_precision=PRECISION)
    if BIAS:
        y_TO += tl.load(bias + o_O, mask=o_O < rows, other=0.0).to(tl.float32)[None, :]
    rounded_TO = y_TO.to(y.dtype.element_ty)
    inside_TO = (t_T < tokens)[:, None] & (o_O < rows)[None, :]
    tl.store(y + t_T[:, None] * rows + o_O[None, :], rounded_TO, mask=inside_TO)
    if PER_TOKEN:
        sums_T = tl.sum(tl.where(inside_TO, tl.abs(rounded_TO.to(tl.float32)), 0.0), axis=1)
        tl.store(partial + row_block * tokens + t_T, sums_T, mask=t_T < tokens)
    else:
        take_T = t_T < tokens
        if MASKED:
            take_T = take_T & (tl.load(counted + t_T, mask=take_T, other=0) != 0)
        sums_O = tl.sum(tl.where(take_T[:, None], tl.abs(rounded_TO.to(tl.float32)), 0.0), axis=0)
        tl.store(partial + token_block * rows + o_O, sums_O, mask=o_O < rows)


@jit
def _normalise_kernel(
    y: tl.tensor,
    counted: tl.tensor,
    norms: tl.tensor,
    partial: tl.tensor,
    tokens: tl.tensor,
    rows: tl.tensor,
    parts: tl.tensor,
    token_stride: tl.tensor,
    row_stride: tl.tensor,
    SMALLEST: tl.constexpr,
    MASKED: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Add up one block of tokens, each divided by its sum over all rows."""
    block = tl.program_id(0).to(tl.int64)
    t_T = block * TOKENS + tl.arange(0, TOKENS)
    j_J = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    norm_T = tl.zeros((TOKENS,), tl.float32)
    for part in range(parts):
        norm_T += tl.load(norms + part * tokens + t_T, mask=t_T < tokens, other=0.0)
    if MASKED:
        norm_T = tl.where(tl.load(counted + t_T, mask=t_T < tokens, other=0) != 0, norm_T, 0.0)
    y_TJ = _tile_of(y, counted, t_T[:, None], j_J[None, :], tokens, rows, token_stride, row_stride, MASKED)
    sums_J = tl.sum(y_TJ * _weights(norm_T, SMALLEST)[:, None], axis=0)
    tl.store(partial + block * rows + j_J, sums_J, mask=j_J < rows)
