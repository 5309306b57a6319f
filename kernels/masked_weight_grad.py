"""Computes the weight gradient of a linear layer for the kept rows only."""

from __future__ import annotations

import math
import mmap
import threading
from contextlib import suppress

import torch

from cl_dist.kernels import weight_grad_on_gpu as gpu
from cl_dist.kernels.backend import path_of

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
    compute = _on_gpu if _has_gpu_kernels(input) else _in_torch
    return compute(x_TI, dy_TO, rows, weight_grad, bias_grad, bias)


@torch.no_grad()
def kept_weight_grad(input: torch.Tensor, grad_output: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
    """Compute `dW[rows] = dY[:, rows]^T X` of a linear layer as a matrix of its kept rows alone.

    `column_weight_grad` does the same for columns.

    Args:
        input: `(..., in_features)`, floating: the layer's input X.
        grad_output: `(..., out_features)`, same leading shape and dtype: the gradient dY of the layer's output.
        rows: `(kept,)` int64, strictly ascending, in `[0, out_features)`; None: all rows.

    Returns:
        `(kept, in_features)`, in the input's dtype.
    """
    tokens = math.prod(input.shape[:-1])
    x_TI, dy_TO = input.reshape(tokens, input.shape[-1]), grad_output.reshape(tokens, grad_output.shape[-1])
    if rows is None:
        return dy_TO.t() @ x_TI
    out_features, in_features, kept = dy_TO.shape[1], x_TI.shape[1], rows.numel()
    if (out_features - kept) * in_features < GATHER_COST * kept and not x_TI.is_cuda:
        return (dy_TO.t() @ x_TI).index_select(0, rows)
    if _has_gpu_kernels(input) and kept:
        return torch.mm(gpu.kept_columns(dy_TO, rows)[0][:, :kept].t(), x_TI)
    return dy_TO.index_select(1, rows).t() @ x_TI


def weight_grad_ways(input: torch.Tensor) -> dict[str, gpu.Way]:
    """Return every way to compute a new weight gradient from this input on its device, by name.

    `masked_weight_grad` takes the one that `weight_grad_way` names; benchmarks and tests compare them.

    Args:
        input: `(tokens, in_features)`, floating.

    Returns:
        Functions of input, grad_output `(tokens, out_features)` and rows (at least one) that return the gradient.
    """
    if not _has_gpu_kernels(input):
        return {"torch": lambda x_TI, dy_TO, rows: _in_torch(x_TI, dy_TO, rows, None, None, False)[0]}
    persistent = gpu.can_describe(input) and (not input.is_cuda or gpu.has_descriptors(input.device))
    return {name: way for name, way in gpu.WAYS.items() if persistent or name != "persistent"}


def weight_grad_way(input: torch.Tensor, kept: int) -> str:
    """Name the way that `masked_weight_grad` takes to a new gradient with this many kept rows."""
    return gpu.way_for(input, kept) if _has_gpu_kernels(input) else "torch"


def _has_gpu_kernels(tensor: torch.Tensor) -> bool:
    return path_of(tensor) == "triton" and tensor.dtype != torch.float64


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
    if bias:
        new = bias_grad is None
        bias_grad = x_TI.new_zeros(out_features) if bias_grad is None else bias_grad
        gpu.add_bias(dy_TO, rows, bias_grad, accumulate=not new)
    if weight_grad is not None:
        gpu.add_to(weight_grad, x_TI, dy_TO, rows)
    elif rows.numel() == 0 or in_features == 0:
        weight_grad = x_TI.new_zeros(out_features, in_features)
    else:
        weight_grad = gpu.WAYS[gpu.way_for(x_TI, rows.numel())](x_TI, dy_TO, rows)
    return weight_grad, bias_grad
