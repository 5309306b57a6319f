"""Computes the weight gradient of a linear layer for the kept rows only."""

from __future__ import annotations

import math
import mmap
import os
import threading
from contextlib import suppress

import torch

from cl_dist.kernels.backend import Launch, blocks, jit, path_of, power_of_two, tl

GATHER_COST = 64
"""Gathering one column of `grad_output` costs as much as multiplying it with this many input features (two cores,
float32, 512 and 4,096 tokens: the two ways break even between 16 and 32 input features at T = 0.7)."""

BLOCK_BYTES = 32 << 20
"""Size of a product that is computed before it is scattered to its rows. Fewer, larger products are faster than ones
that stay in the cache (two cores: 6 % between seven blocks of a 7B layer and one or two), but take more memory."""

BLOCK_ROWS = 128
"""Fewest rows of such a product: a thinner matrix product is slower."""

LAZY_BYTES = 2 << 20
"""From this size on, the dropped rows of a new gradient take no memory. Smaller gradients are filled with zeros, which
is cheaper than new pages and does not show in a step's peak memory."""

ALWAYS_LAZY_BYTES = 32 << 20
"""From this size on, the C library's allocator takes new pages from the system every time (the upper bound of glibc's
adaptive limit), so that mapping them ourselves costs nothing extra. Below it the allocator reuses memory, and new pages
pay only if a row fills a page: with several rows per page, the kept ones touch nearly all pages."""

GATHERED_FEATURES = 512
"""Up to this many input features, a GPU reads the kept columns of `grad_output` in place. A wider product reads each of
them more than four times, so they are first copied next to each other, which makes the loads wide and asynchronous."""


@torch.no_grad()
def masked_weight_grad(
    input: torch.Tensor,
    grad_output: torch.Tensor,
    rows: torch.Tensor,
    weight_grad: torch.Tensor | None = None,
    bias_grad: torch.Tensor | None = None,
    *,
    bias: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute `dW[rows] = dY[:, rows]^T X` of a linear layer, and nothing for the other rows (MIGU, arXiv 2406.17245).

    The kept rows equal those of the dense gradient, up to rounding from a different order of additions. Repeated calls
    give the same bits.

    Args:
        input: `(..., in_features)`, floating: the layer's input X, any strides.
        grad_output: `(..., out_features)`, same leading shape and dtype: the gradient dY of the layer's output.
        rows: `(kept,)` int64, strictly ascending, in `[0, out_features)`: the kept rows of the weight. Not checked on
            a GPU.
        weight_grad: `(out_features, in_features)`, floating: the kept rows are added to it in place, the others keep
            their values. None creates a gradient of the input's dtype whose other rows are exactly zero, even if their
            columns of `grad_output` hold NaN or Inf.
        bias_grad: `(out_features,)`, floating: the same for the bias. Only with `bias`.
        bias: Also compute the gradient of the bias for the kept rows, the sum of `grad_output` over tokens.

    Returns:
        The weight gradient and the bias gradient (None without `bias`): the given tensors where there were any.

    Raises:
        ValueError: Shapes, dtypes or devices do not match.
    """
    _check(input, grad_output, rows, weight_grad, bias_grad, bias)
    tokens = math.prod(input.shape[:-1])
    x_TI, dy_TO = input.reshape(tokens, input.shape[-1]), grad_output.reshape(tokens, grad_output.shape[-1])
    on_gpu = path_of(input) == "triton" and input.dtype != torch.float64
    return (_on_gpu if on_gpu else _in_torch)(x_TI, dy_TO, rows, weight_grad, bias_grad, bias)


def _check(
    input: torch.Tensor,
    grad_output: torch.Tensor,
    rows: torch.Tensor,
    weight_grad: torch.Tensor | None,
    bias_grad: torch.Tensor | None,
    bias: bool,
) -> None:
    if input.dim() == 0 or input.shape[:-1] != grad_output.shape[:-1] or input.dim() != grad_output.dim():
        raise ValueError(
            f"input {tuple(input.shape)} and grad_output {tuple(grad_output.shape)} do not have the same tokens"
        )
    if input.dtype != grad_output.dtype or not input.is_floating_point():
        raise ValueError(f"input {input.dtype} and grad_output {grad_output.dtype} must have one floating dtype")
    if rows.dim() != 1 or rows.dtype != torch.int64:
        raise ValueError(f"rows must be (kept,) int64, not {tuple(rows.shape)} {rows.dtype}")
    if bias_grad is not None and not bias:
        raise ValueError("a bias_grad was given, but bias is False")
    out_features, in_features = grad_output.shape[-1], input.shape[-1]
    for name, grad, shape in (
        ("weight_grad", weight_grad, (out_features, in_features)),
        ("bias_grad", bias_grad, (out_features,)),
    ):
        if grad is not None and (grad.shape != shape or not grad.is_floating_point()):
            raise ValueError(f"{name} must be {shape} and floating, not {tuple(grad.shape)} {grad.dtype}")
    others = [tensor for tensor in (grad_output, rows, weight_grad, bias_grad) if tensor is not None]
    if any(tensor.device != input.device for tensor in others):
        raise ValueError(f"all tensors must be on {input.device}, the device of the input")


def _in_torch(
    x_TI: torch.Tensor,
    dy_TO: torch.Tensor,
    rows: torch.Tensor,
    weight_grad: torch.Tensor | None,
    bias_grad: torch.Tensor | None,
    bias: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    out_features, in_features, kept = dy_TO.shape[1], x_TI.shape[1], rows.numel()
    if bias:
        bias_grad = _put(bias_grad, rows, dy_TO.sum(dim=0).index_select(0, rows), out_features)
    # Three ways, by what they cost: the whole product, the whole product less its dropped rows, or the kept rows alone.
    if kept == out_features:
        product = dy_TO.t() @ x_TI
        return product if weight_grad is None else weight_grad.add_(product), bias_grad
    if (out_features - kept) * in_features < GATHER_COST * kept:
        product = (dy_TO.t() @ x_TI).index_select(0, rows)
        return _put(weight_grad, rows, product, out_features), bias_grad
    if weight_grad is None:
        weight_grad = _zeros(out_features, in_features, x_TI)
        _fill(weight_grad, x_TI, dy_TO, rows)
    else:
        _add(weight_grad, x_TI, dy_TO, rows)
    return weight_grad, bias_grad


def _put(grad: torch.Tensor | None, rows: torch.Tensor, values: torch.Tensor, out_features: int) -> torch.Tensor:
    """Add `values` to the rows of `grad`, or put them into a new gradient."""
    if grad is None:
        return values.new_zeros(out_features, *values.shape[1:]).index_copy_(0, rows, values)
    return grad.index_copy_(0, rows, grad.index_select(0, rows).add_(values))


def _fill(weight_grad: torch.Tensor, x_TI: torch.Tensor, dy_TO: torch.Tensor, rows: torch.Tensor) -> None:
    for block in _blocks(rows, x_TI):
        product = _workspace(block.numel(), x_TI)
        torch.mm(dy_TO.index_select(1, block).t(), x_TI, out=product)
        weight_grad.index_copy_(0, block, product)


def _add(weight_grad: torch.Tensor, x_TI: torch.Tensor, dy_TO: torch.Tensor, rows: torch.Tensor) -> None:
    for block in _blocks(rows, x_TI):
        before, dy_TK = weight_grad.index_select(0, block), dy_TO.index_select(1, block)
        if before.dtype == x_TI.dtype:
            before.addmm_(dy_TK.t(), x_TI)
        else:
            before.add_(dy_TK.t() @ x_TI)
        weight_grad.index_copy_(0, block, before)


class _Workspaces(threading.local):
    """One reusable buffer per thread and dtype for the products of a block."""

    def __init__(self) -> None:
        self.flat: dict[torch.dtype, torch.Tensor] = {}


_workspaces = _Workspaces()


def _workspace(rows: int, x_TI: torch.Tensor) -> torch.Tensor:
    """Return an uninitialised `(rows, in_features)` tensor, in the same memory on every call.

    A block is so large that the allocator would return it to the system each time, and touching new pages takes a fifth
    as long as the product.
    """
    size = rows * x_TI.shape[1]
    if x_TI.device.type != "cpu":
        return x_TI.new_empty(rows, x_TI.shape[1])
    flat = _workspaces.flat.get(x_TI.dtype)
    if flat is None or flat.numel() < size:
        flat = _workspaces.flat[x_TI.dtype] = x_TI.new_empty(size)
    return flat[:size].view(rows, x_TI.shape[1])


def _blocks(rows: torch.Tensor, x_TI: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Split `rows` into pieces of nearly equal length whose products take about `BLOCK_BYTES`."""
    if rows.numel() == 0:
        return ()
    most = max(BLOCK_ROWS, BLOCK_BYTES // max(1, x_TI.shape[1] * x_TI.element_size()))
    pieces = -(-rows.numel() // most)
    return rows.split(-(-rows.numel() // pieces))


def _zeros(rows: int, columns: int, like: torch.Tensor) -> torch.Tensor:
    """Return zeros. Large ones on the CPU get a page of memory only when it is first written to.

    Writing 180 MB of zeros takes a fifth as long as the matrix product, and dropped rows are never written again.
    `torch.zeros` writes them all; a private mapping of the system's zero page writes none. NumPy's zeros write none
    either, but ask for huge pages, so that a kept row would bring its dropped neighbours into memory.
    """
    size = rows * columns * like.element_size()
    pays = size >= ALWAYS_LAZY_BYTES or (size >= LAZY_BYTES and columns * like.element_size() >= mmap.PAGESIZE)
    if not pays or like.device.type != "cpu" or not hasattr(mmap, "MAP_ANONYMOUS"):
        return like.new_zeros(rows, columns)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        with suppress(OSError):  # a kernel without huge pages rejects the advice, and needs none
            pages.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(pages, dtype=like.dtype).view(rows, columns)


def _on_gpu(
    x_TI: torch.Tensor,
    dy_TO: torch.Tensor,
    rows: torch.Tensor,
    weight_grad: torch.Tensor | None,
    bias_grad: torch.Tensor | None,
    bias: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    out_features, in_features = dy_TO.shape[1], x_TI.shape[1]
    new_weight, new_bias = weight_grad is None, bias and bias_grad is None
    if weight_grad is None:
        weight_grad = x_TI.new_zeros(out_features, in_features)
    if new_bias:
        bias_grad = x_TI.new_zeros(out_features)
    if rows.numel() == 0:
        return weight_grad, bias_grad
    gather = in_features <= GATHERED_FEATURES
    if bias_grad is not None:
        _bias_launch(dy_TO, rows, bias_grad, not new_bias).run()
    dy = dy_TO if gather else _kept_columns(dy_TO, rows)
    _weight_launch(x_TI, dy, rows, weight_grad, not new_weight, gather).run()
    return weight_grad, bias_grad


def _kept_columns(dy_TO: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Copy the kept columns, padded with repeats so that every token begins at a multiple of 16 elements."""
    return dy_TO.index_select(1, torch.cat((rows, rows[:1].expand(-rows.numel() % 16))))


def _precision(dtype: torch.dtype) -> str:
    """Return how to multiply float32: exactly, or in TF32 if the user allows that for PyTorch's own products."""
    return "tf32" if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest" else "ieee"


def _interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, whose `tl.dot` misreads bfloat16 as integers."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _tile(kept: int, in_features: int, dtype: torch.dtype, gather: bool) -> dict[str, int]:
    """Choose the tile of the product, without autotuning: what gets compiled depends only on sizes and dtype.

    Products of 128 x 128 with three stages take 96 KiB of shared memory on sm_90, and the 64 KiB that gfx942 has. Exact
    float32 has no matrix instruction, so its tile must fit in registers. Gathered columns pass through registers one by
    one, which limits their tile likewise.
    """
    exact = dtype == torch.float32 and _precision(dtype) == "ieee"
    most, tokens = (64, 16) if exact else (128, 32 if dtype == torch.float32 or gather else 64)
    # tl.dot requires at least 16 in every dimension.
    return {
        "BLOCK_R": min(most, max(16, power_of_two(kept))),
        "BLOCK_I": min(most, max(16, power_of_two(in_features))),
        "BLOCK_T": tokens,
    }


def _weight_launch(
    x_TI: torch.Tensor,
    dy: torch.Tensor,
    rows: torch.Tensor,
    weight_grad: torch.Tensor,
    accumulate: bool,
    gather: bool,
) -> Launch:
    """Launch one program per tile of kept rows and input features. Each loops over all tokens, so none share a sum."""
    kept, in_features = rows.numel(), x_TI.shape[1]
    tile = _tile(kept, in_features, x_TI.dtype, gather)
    arguments = {
        "x": x_TI,
        "dy": dy,
        "rows": rows,
        "weight_grad": weight_grad,
        "tokens": x_TI.shape[0],
        "in_features": in_features,
        "kept": kept,
        "columns": kept if gather else dy.shape[1],
        "x_stride_t": x_TI.stride(0),
        "x_stride_i": x_TI.stride(1),
        "dy_stride_t": dy.stride(0),
        "dy_stride_o": dy.stride(1),
        "grad_stride_o": weight_grad.stride(0),
        "grad_stride_i": weight_grad.stride(1),
        "ACCUMULATE": accumulate,
        "GATHER": gather,
        "PRECISION": _precision(x_TI.dtype),
        "WIDEN": x_TI.dtype == torch.bfloat16 and _interpreted(),
        **tile,
    }
    large = tile["BLOCK_R"] * tile["BLOCK_I"] > 64 * 64
    grid = (blocks(kept, tile["BLOCK_R"]), blocks(in_features, tile["BLOCK_I"]))
    return Launch(_weight_kernel, grid, arguments, num_warps=8 if large else 4, num_stages=3)


def _bias_launch(dy_TO: torch.Tensor, rows: torch.Tensor, bias_grad: torch.Tensor, accumulate: bool) -> Launch:
    arguments = {
        "dy": dy_TO,
        "rows": rows,
        "bias_grad": bias_grad,
        "tokens": dy_TO.shape[0],
        "kept": rows.numel(),
        "dy_stride_t": dy_TO.stride(0),
        "dy_stride_o": dy_TO.stride(1),
        "grad_stride": bias_grad.stride(0),
        "ACCUMULATE": accumulate,
        "BLOCK_R": 32,
        "BLOCK_T": 64,
    }
    return Launch(_bias_kernel, (blocks(rows.numel(), 32),), arguments, num_warps=4)


@jit
def _weight_kernel(
    x: tl.tensor,
    dy: tl.tensor,
    rows: tl.tensor,
    weight_grad: tl.tensor,
    tokens: tl.tensor,
    in_features: tl.tensor,
    kept: tl.tensor,
    columns: tl.tensor,
    x_stride_t: tl.tensor,
    x_stride_i: tl.tensor,
    dy_stride_t: tl.tensor,
    dy_stride_o: tl.tensor,
    grad_stride_o: tl.tensor,
    grad_stride_i: tl.tensor,
    ACCUMULATE: tl.constexpr,
    GATHER: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_T: tl.constexpr,
) -> None:
    """Compute `weight_grad[rows[r], i] (+)= sum over t of dy[t, rows[r]] * x[t, i]`, or `dy[t, r]` without GATHER."""
    r_R = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    i_I = tl.program_id(1).to(tl.int64) * BLOCK_I + tl.arange(0, BLOCK_I)
    row_R = tl.load(rows + r_R, mask=r_R < kept, other=0)
    column_R = row_R if GATHER else r_R
    sums_RI = tl.zeros((BLOCK_R, BLOCK_I), tl.float32)
    for start in range(0, tokens, BLOCK_T):
        t_T = start + tl.arange(0, BLOCK_T).to(tl.int64)
        dy_RT = tl.load(
            dy + column_R[:, None] * dy_stride_o + t_T[None, :] * dy_stride_t,
            mask=(r_R < columns)[:, None] & (t_T < tokens)[None, :],
            other=0.0,
        )
        x_TI = tl.load(
            x + t_T[:, None] * x_stride_t + i_I[None, :] * x_stride_i,
            mask=(t_T < tokens)[:, None] & (i_I < in_features)[None, :],
            other=0.0,
        )
        if WIDEN:
            dy_RT, x_TI = dy_RT.to(tl.float32), x_TI.to(tl.float32)
        sums_RI = tl.dot(dy_RT, x_TI, sums_RI, input_precision=PRECISION)
    here_RI = weight_grad + row_R[:, None] * grad_stride_o + i_I[None, :] * grad_stride_i
    inside_RI = (r_R < kept)[:, None] & (i_I < in_features)[None, :]
    if ACCUMULATE:
        sums_RI += tl.load(here_RI, mask=inside_RI, other=0.0).to(tl.float32)
    tl.store(here_RI, sums_RI.to(weight_grad.dtype.element_ty), mask=inside_RI)


@jit
def _bias_kernel(
    dy: tl.tensor,
    rows: tl.tensor,
    bias_grad: tl.tensor,
    tokens: tl.tensor,
    kept: tl.tensor,
    dy_stride_t: tl.tensor,
    dy_stride_o: tl.tensor,
    grad_stride: tl.tensor,
    ACCUMULATE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
) -> None:
    """Compute `bias_grad[rows[r]] (+)= sum over t of dy[t, rows[r]]`."""
    r_R = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    row_R = tl.load(rows + r_R, mask=r_R < kept, other=0)
    sums_TR = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    for start in range(0, tokens, BLOCK_T):
        t_T = start + tl.arange(0, BLOCK_T).to(tl.int64)
        inside_TR = (t_T < tokens)[:, None] & (r_R < kept)[None, :]
        here_TR = dy + t_T[:, None] * dy_stride_t + row_R[None, :] * dy_stride_o
        sums_TR += tl.load(here_TR, mask=inside_TR, other=0.0).to(tl.float32)
    sums_R = tl.sum(sums_TR, axis=0)
    here_R = bias_grad + row_R * grad_stride
    if ACCUMULATE:
        sums_R += tl.load(here_R, mask=r_R < kept, other=0.0).to(tl.float32)
    tl.store(here_R, sums_R.to(bias_grad.dtype.element_ty), mask=r_R < kept)
