"""The ways in which a GPU computes the kept rows of a weight gradient, and the rule that chooses among them.

All of them compute `dW[rows] = dY[:, rows]^T X`. They differ in who multiplies, in whether the kept columns of dY are
copied next to each other first, and in how the zeros of the dropped rows get into memory.

The kept columns of a weight gradient are the mirror image: `dW[:, columns]^T = X[:, columns]^T dY`, the same product
with the input and the output's gradient exchanged. What is wanted of them is a matrix of the kept columns alone, so
there are no zeros to write.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping

import torch

from cl_dist.kernels.backend import Launch, allows_tf32, blocks, jit, power_of_two, release, tl

GATHERED_FEATURES = 512
"""Up to this many input features, a GPU reads the kept columns of `grad_output` in place. A wider product reads each of
them more than four times, so they are first copied next to each other, which makes the loads wide and asynchronous."""

COPIED_TOKENS = 1024
"""From this many tokens on, the vendor's product pays for writing its result and reading it back. Both cost 4 bytes per
element at memory speed; a faster product saves time in proportion to the tokens. Predicted for an H100 (3.35 TB/s, 650
against 400 TFLOP/s: from 620 tokens on), not measured."""

LEAST_FILL = 0.75
"""Share of the multiprocessors that the tiles of `persistent` have to keep busy; its last round leaves the others idle.
Below it, the vendor's product, which cuts its tiles to fit, is predicted to be faster."""

TALL, WIDE, DEEP = 128, 256, 64
"""Kept rows and input features of a tile of `persistent`, and tokens that a step of its loop multiplies."""

ZERO_ROWS = 8
"""Rows of a tile's width that `persistent` clears in a step: 16 bytes for each of its 256 threads."""

ALIGNMENT = 16
"""Bytes: tensor descriptors need the first element and the distance between lines at multiples of it."""

Way = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""`(input (tokens, in), grad_output (tokens, out), rows (kept,) int64) -> (out, in)`: a new gradient. At least one row
and one input feature."""


def way_for(x_TI: torch.Tensor, kept: int) -> str:
    """Choose one of `WAYS` by shape, dtype and device: predicted from arithmetic, not yet measured on a GPU.

    With a narrow input the product is cheaper than any copy. With few tokens it is short, and what counts is memory
    that `tiles` does not touch twice. Otherwise the fastest product wins: the persistent one on devices with hardware
    for tensor descriptors, if its tiles fill the device, and else the vendor's.
    """
    tokens, in_features = x_TI.shape
    if in_features <= GATHERED_FEATURES:
        return "gathered"
    if can_describe(x_TI) and has_descriptors(x_TI.device):
        tiles = blocks(kept, TALL) * blocks(in_features, WIDE)
        rounds = blocks(tiles, multiprocessors(x_TI.device))
        if tiles >= LEAST_FILL * rounds * multiprocessors(x_TI.device):
            return "persistent"
    return "vendor" if tokens >= COPIED_TOKENS else "tiles"


def can_describe(x_TI: torch.Tensor) -> bool:
    """Whether `persistent` can multiply with this input: 16-bit numbers, in contiguous lines that are aligned."""
    size = x_TI.element_size()
    aligned = x_TI.data_ptr() % ALIGNMENT == 0 and x_TI.stride(0) * size % ALIGNMENT == 0 and x_TI.stride(0) > 0
    return size == 2 and len(x_TI) > 0 and x_TI.stride(1) == 1 and aligned


@functools.lru_cache
def multiprocessors(device: torch.device) -> int:
    """Return a GPU's number of multiprocessors; an H100's for other devices, which only simulate one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


@functools.lru_cache
def has_descriptors(device: torch.device) -> bool:
    """Whether a device has hardware for tensor descriptors: NVIDIA's TMA, from compute capability 9.0 on.

    Those of Triton before 3.6 are not tested, and not used.
    """
    if tl is None or torch.version.cuda is None:
        return False
    import triton

    return release(triton) >= (3, 6) and torch.cuda.get_device_capability(device) >= (9, 0)


def _gathered(x_TI: torch.Tensor, dy_TO: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """A Triton product that reads the kept columns in place, into zeros."""
    grad = x_TI.new_zeros(dy_TO.shape[1], x_TI.shape[1])
    _tile_launch(x_TI, dy_TO, rows, grad, accumulate=False, gather=True).run()
    return grad


def _tiles(x_TI: torch.Tensor, dy_TO: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Copied columns, a Triton product with one program per tile, into zeros."""
    grad = x_TI.new_zeros(dy_TO.shape[1], x_TI.shape[1])
    _tile_launch(x_TI, kept_columns(dy_TO, rows)[0], rows, grad, accumulate=False, gather=False).run()
    return grad


def _vendor(x_TI: torch.Tensor, dy_TO: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Copied columns, the vendor's product, and one pass that puts its rows in place and writes the zeros."""
    dy_TK, places = kept_columns(dy_TO, rows)
    product = torch.mm(dy_TK[:, : len(rows)].t(), x_TI)
    grad = x_TI.new_empty(dy_TO.shape[1], x_TI.shape[1])
    _spread_launch(product, places, grad).run()
    return grad


def _persistent(x_TI: torch.Tensor, dy_TO: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Copied columns, a Triton product with tensor descriptors whose programs write the zeros between their tiles.

    Raises:
        ValueError: `can_describe` says no.
    """
    if not can_describe(x_TI):
        raise ValueError(f"tensor descriptors cannot read {x_TI.dtype} with strides {x_TI.stride()}")
    grad = x_TI.new_empty(dy_TO.shape[1], x_TI.shape[1])
    _persistent_launch(x_TI, *kept_columns(dy_TO, rows), rows, grad).run()
    return grad


WAYS: Mapping[str, Way] = {"gathered": _gathered, "tiles": _tiles, "vendor": _vendor, "persistent": _persistent}
"""Every way to compute a new gradient, by name."""


ColumnWay = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, bool], torch.Tensor]
"""`(input (tokens, in), grad_output (tokens, out), columns (kept,) int64, transposed) -> (out, kept)`, or transposed
`(kept, out)`. At least one column and one output feature."""


def column_way_for(out_features: int) -> str:
    """Choose one of `COLUMN_WAYS` by how often each kept column of the input would be read; predicted, as `way_for`."""
    return "gathered" if out_features <= GATHERED_FEATURES else "vendor"


def _gathered_columns(x_TI: torch.Tensor, dy_TO: torch.Tensor, columns: torch.Tensor, transposed: bool) -> torch.Tensor:
    """A Triton product that reads the kept columns of the input in place: no copy, and no memory for one."""
    shape = len(columns), dy_TO.shape[1]
    grad = x_TI.new_empty(shape if transposed else shape[::-1])
    grad_KO = grad if transposed else grad.t()
    _tile_launch(dy_TO, x_TI, columns, grad_KO, accumulate=False, gather=True, compact=True).run()
    return grad


def _vendor_columns(x_TI: torch.Tensor, dy_TO: torch.Tensor, columns: torch.Tensor, transposed: bool) -> torch.Tensor:
    """Copied columns and the vendor's product."""
    x_TK = kept_columns(x_TI, columns)[0][:, : len(columns)]
    return torch.mm(x_TK.t(), dy_TO) if transposed else torch.mm(dy_TO.t(), x_TK)


COLUMN_WAYS: Mapping[str, ColumnWay] = {"gathered": _gathered_columns, "vendor": _vendor_columns}
"""Every way to the kept columns, by name."""


def add_to(weight_grad: torch.Tensor, x_TI: torch.Tensor, dy_TO: torch.Tensor, rows: torch.Tensor) -> None:
    """Add the kept rows to a given gradient of any floating dtype."""
    gather = x_TI.shape[1] <= GATHERED_FEATURES
    dy = dy_TO if gather else kept_columns(dy_TO, rows)[0]
    _tile_launch(x_TI, dy, rows, weight_grad, accumulate=True, gather=gather).run()


def add_bias(dy_TO: torch.Tensor, rows: torch.Tensor, bias_grad: torch.Tensor, accumulate: bool) -> None:
    """Add the sums of the kept columns to a gradient of the bias, or put them there."""
    _bias_launch(dy_TO, rows, bias_grad, accumulate).run()


def kept_columns(dy_TO: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Copy the kept columns, and look up every row's place among the kept ones, in one launch.

    Returns:
        `(tokens, kept)`, padded with zeros so that every token begins at a multiple of 16, and `(out,)` int32: the
        position of a row in `rows`, or -1 for a dropped row.
    """
    copy = dy_TO.new_empty(len(dy_TO), blocks(len(rows), 16) * 16)
    places = rows.new_empty(dy_TO.shape[1], dtype=torch.int32)
    _copy_launch(dy_TO, rows, copy, places).run()
    return copy, places


def _precision(dtype: torch.dtype) -> str:
    """Return how to multiply float32: exactly, or in TF32 if the user allows that for PyTorch's own products."""
    return "tf32" if dtype == torch.float32 and allows_tf32() else "ieee"


def _is_exact(dtype: torch.dtype) -> bool:
    """Whether products are of exact float32, without matrix instructions."""
    return dtype == torch.float32 and _precision(dtype) == "ieee"


def _interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, whose `tl.dot` misreads bfloat16 as integers."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _tile(kept: int, in_features: int, dtype: torch.dtype, gather: bool) -> dict[str, int]:
    """Choose the tile of the product, without autotuning: what gets compiled depends only on sizes and dtype.

    Products of 128 x 128 with three stages take 96 KiB of shared memory on sm_90, and the 64 KiB that gfx942 has. Exact
    float32 has no matrix instruction, so its tile must fit in registers. Gathered columns pass through registers one by
    one, which limits their tile, and the stages of a loop that reads them, likewise (3 stages of exact float32 spill
    with Triton 3.6, 32 tokens of TF32 with 3.7).
    """
    exact = _is_exact(dtype)
    width = dtype.itemsize * (2 if gather else 1)
    most, tokens = (64, 16) if exact else (128, 128 // width)
    # tl.dot requires at least 16 in every dimension.
    return {
        "BLOCK_R": min(most, max(16, power_of_two(kept))),
        "BLOCK_I": min(most, max(16, power_of_two(in_features))),
        "BLOCK_T": tokens,
    }


def _tile_launch(
    x_TI: torch.Tensor,
    dy: torch.Tensor,
    rows: torch.Tensor,
    weight_grad: torch.Tensor,
    accumulate: bool,
    gather: bool,
    compact: bool = False,
) -> Launch:
    """Launch one program per tile of kept rows and input features. Each loops over all tokens, so none share a sum.

    With `compact`, `weight_grad` has only the kept rows, next to each other.
    """
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
        "COMPACT": compact,
        "PRECISION": _precision(x_TI.dtype),
        "WIDEN": x_TI.dtype == torch.bfloat16 and _interpreted(),
        **tile,
    }
    large = tile["BLOCK_R"] * tile["BLOCK_I"] > 64 * 64
    grid = (blocks(kept, tile["BLOCK_R"]), blocks(in_features, tile["BLOCK_I"]))
    stages = 2 if gather and _is_exact(x_TI.dtype) else 3
    return Launch(_tile_kernel, grid, arguments, num_warps=8 if large else 4, num_stages=stages)


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
        "BLOCK_T": 32,
    }
    return Launch(_bias_kernel, (blocks(rows.numel(), 32),), arguments, num_warps=4)


@jit
def _tile_kernel(
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
    COMPACT: tl.constexpr,
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
    sums_RI = tl.zeros((BLOCK_R, BLOCK_I), tl.float32)
    for start in range(0, tokens, BLOCK_T):
        t_T = start + tl.arange(0, BLOCK_T).to(tl.int64)
        if GATHER:
            # Neighbouring threads read neighbouring kept columns of a token, which mostly share a line of the cache.
            dy_TR = tl.load(
                dy + t_T[:, None] * dy_stride_t + row_R[None, :] * dy_stride_o,
                mask=(t_T < tokens)[:, None] & (r_R < columns)[None, :],
                other=0.0,
            )
            dy_RT = dy_TR.T
        else:
            dy_RT = tl.load(
                dy + r_R[:, None] * dy_stride_o + t_T[None, :] * dy_stride_t,
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
    grad_R = r_R if COMPACT else row_R
    here_RI = weight_grad + grad_R[:, None] * grad_stride_o + i_I[None, :] * grad_stride_i
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


def _copy_launch(dy_TO: torch.Tensor, rows: torch.Tensor, copy: torch.Tensor, places: torch.Tensor) -> Launch:
    arguments = {
        "dy": dy_TO,
        "rows": rows,
        "copy": copy,
        "places": places,
        "tokens": len(dy_TO),
        "out_features": len(places),
        "kept": len(rows),
        "columns": copy.shape[1],
        "dy_stride_t": dy_TO.stride(0),
        "dy_stride_o": dy_TO.stride(1),
        "STEPS": len(rows).bit_length(),
        "BLOCK_T": 16,
        "BLOCK_R": 256,
    }
    # At least one program, because places are looked up even without tokens.
    grid = (max(1, blocks(len(dy_TO), 16)), blocks(copy.shape[1], 256))
    return Launch(_copy_kernel, grid, arguments, num_warps=4)


def _spread_launch(product: torch.Tensor, places: torch.Tensor, grad: torch.Tensor) -> Launch:
    """Launch one program per piece of the gradient, kept and dropped rows alike."""
    arguments = {
        "product": product,
        "places": places,
        "grad": grad,
        "out_features": len(grad),
        "in_features": grad.shape[1],
        "BLOCK_R": 16,
        "BLOCK_I": 512,
    }
    return Launch(_spread_kernel, (blocks(len(grad), 16), blocks(grad.shape[1], 512)), arguments, num_warps=4)


def _persistent_launch(
    x_TI: torch.Tensor,
    dy_TK: torch.Tensor,
    places: torch.Tensor,
    rows: torch.Tensor,
    grad: torch.Tensor,
) -> Launch:
    """Launch as many programs as the device has multiprocessors, at most one per tile."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    kept, in_features = len(rows), x_TI.shape[1]
    arguments = {
        "x": TensorDescriptor(x_TI, list(x_TI.shape), list(x_TI.stride()), [DEEP, WIDE]),
        "dy": TensorDescriptor(dy_TK, list(dy_TK.shape), list(dy_TK.stride()), [DEEP, TALL]),
        "rows": rows,
        "places": places,
        "grad": grad,
        "tokens": len(x_TI),
        "out_features": len(grad),
        "in_features": in_features,
        "kept": kept,
        "WIDEN": x_TI.dtype == torch.bfloat16 and _interpreted(),
        "BLOCK_R": TALL,
        "BLOCK_I": WIDE,
        "BLOCK_T": DEEP,
        "BLOCK_Z": ZERO_ROWS,
    }
    tiles = blocks(kept, TALL) * blocks(in_features, WIDE)
    programs = min(tiles, multiprocessors(x_TI.device))
    return Launch(_persistent_kernel, (programs,), arguments, num_warps=8, num_stages=4)


@jit
def _copy_kernel(
    dy: tl.tensor,
    rows: tl.tensor,
    copy: tl.tensor,
    places: tl.tensor,
    tokens: tl.tensor,
    out_features: tl.tensor,
    kept: tl.tensor,
    columns: tl.tensor,
    dy_stride_t: tl.tensor,
    dy_stride_o: tl.tensor,
    STEPS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
) -> None:
    """Compute `copy[t, r] = dy[t, rows[r]]`, zero in the columns of the padding; then some rows' places."""
    pid_t, pid_r = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    t_T1 = (pid_t * BLOCK_T + tl.arange(0, BLOCK_T))[:, None]
    r_R = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    row_R = tl.load(rows + r_R, mask=r_R < kept, other=0)
    inside_TR = (t_T1 < tokens) & (r_R < kept)[None, :]
    values_TR = tl.load(dy + t_T1 * dy_stride_t + row_R[None, :] * dy_stride_o, mask=inside_TR, other=0.0)
    tl.store(copy + t_T1 * columns + r_R[None, :], values_TR, mask=(t_T1 < tokens) & (r_R < columns)[None, :])
    # Count the kept rows before each row, by binary search in the ascending list.
    number = pid_t * tl.num_programs(1) + pid_r
    for start in range(number * BLOCK_R, out_features, tl.num_programs(0) * tl.num_programs(1) * BLOCK_R):
        o_R = start + tl.arange(0, BLOCK_R)
        low_R = tl.zeros_like(o_R)
        high_R = low_R + kept
        for _ in tl.static_range(STEPS):
            middle_R = (low_R + high_R) // 2
            open_R = middle_R < high_R
            before_R = open_R & (tl.load(rows + middle_R, mask=open_R, other=0) < o_R)
            low_R = tl.where(before_R, middle_R + 1, low_R)
            high_R = tl.where(before_R, high_R, middle_R)
        found_R = tl.load(rows + low_R, mask=low_R < kept, other=-1) == o_R
        tl.store(places + o_R, tl.where(found_R, low_R, -1).to(tl.int32), mask=o_R < out_features)


@jit
def _spread_kernel(
    product: tl.tensor,
    places: tl.tensor,
    grad: tl.tensor,
    out_features: tl.tensor,
    in_features: tl.tensor,
    BLOCK_R: tl.constexpr,
    BLOCK_I: tl.constexpr,
) -> None:
    """Write every row of the gradient: its row of the product, or zeros."""
    o_R = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    i_1I = (tl.program_id(1).to(tl.int64) * BLOCK_I + tl.arange(0, BLOCK_I))[None, :]
    place_R1 = tl.load(places + o_R, mask=o_R < out_features, other=-1).to(tl.int64)[:, None]
    inside_1I = i_1I < in_features
    values_RI = tl.load(product + place_R1 * in_features + i_1I, mask=(place_R1 >= 0) & inside_1I, other=0.0)
    tl.store(grad + o_R[:, None] * in_features + i_1I, values_RI, mask=(o_R < out_features)[:, None] & inside_1I)


@jit
def _dropped(
    places: tl.tensor,
    start: tl.tensor,
    stop: tl.tensor,
    BLOCK_Z: tl.constexpr,
) -> tl.tensor:
    """Return which of the `BLOCK_Z` rows from `start` on are dropped ones before `stop`."""
    o_Z = start + tl.arange(0, BLOCK_Z)
    return tl.load(places + o_Z, mask=o_Z < stop, other=0) < 0


@jit
def _clear(
    grad: tl.tensor,
    start: tl.tensor,
    dropped_Z: tl.tensor,
    i_1I: tl.tensor,
    in_features: tl.tensor,
    BLOCK_Z: tl.constexpr,
) -> None:
    """Write zeros to the dropped ones among the rows from `start` on."""
    o_Z1 = (start + tl.arange(0, BLOCK_Z).to(tl.int64))[:, None]
    here_ZI = grad + o_Z1 * in_features + i_1I
    tl.store(here_ZI, tl.zeros(here_ZI.shape, grad.dtype.element_ty), dropped_Z[:, None] & (i_1I < in_features))


@jit
def _persistent_kernel(
    x: tl.tensor,
    dy: tl.tensor,
    rows: tl.tensor,
    places: tl.tensor,
    grad: tl.tensor,
    tokens: tl.tensor,
    out_features: tl.tensor,
    in_features: tl.tensor,
    kept: tl.tensor,
    WIDEN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_Z: tl.constexpr,
) -> None:
    """Compute tiles of `grad[rows[r], i] = sum over t of dy[t, r] * x[t, i]`, each with its share of the zeros."""
    tiles_r = tl.cdiv(kept, BLOCK_R)
    tiles = tiles_r * tl.cdiv(in_features, BLOCK_I)
    share = tl.cdiv(out_features, tiles_r)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
        tile_r, tile_i = tile % tiles_r, tile // tiles_r
        i_1I = (tile_i * BLOCK_I + tl.arange(0, BLOCK_I).to(tl.int64))[None, :]
        row, stop = tile_r * share, tl.minimum((tile_r + 1) * share, out_features)
        dropped_Z = _dropped(places, row, stop, BLOCK_Z)
        sums_RI = tl.zeros((BLOCK_R, BLOCK_I), tl.float32)
        for start in tl.range(0, tokens, BLOCK_T):
            dy_TR = dy.load([start, tile_r * BLOCK_R])
            x_TI = x.load([start, tile_i * BLOCK_I])
            if WIDEN:
                dy_TR, x_TI = dy_TR.to(tl.float32), x_TI.to(tl.float32)
            sums_RI = tl.dot(dy_TR.T, x_TI, sums_RI)
            # One store per thread and step: zeros drain while the tile is multiplied. The next step's rows are looked
            # up a step ahead, so that nothing waits for them.
            _clear(grad, row, dropped_Z, i_1I, in_features, BLOCK_Z)
            row += BLOCK_Z
            dropped_Z = _dropped(places, row, stop, BLOCK_Z)
        for start in tl.range(row, stop, BLOCK_Z):
            _clear(grad, start, _dropped(places, start, stop, BLOCK_Z), i_1I, in_features, BLOCK_Z)
        r_R = tile_r * BLOCK_R + tl.arange(0, BLOCK_R).to(tl.int64)
        row_R1 = tl.load(rows + r_R, mask=r_R < kept, other=0)[:, None]
        inside_RI = (r_R < kept)[:, None] & (i_1I < in_features)
        tl.store(grad + row_R1 * in_features + i_1I, sums_RI.to(grad.dtype.element_ty), mask=inside_RI)
