"""Computes the output magnitude of every row of a linear layer, the signal by which MIGU selects rows.

Tokens are summed in blocks of 32: in float32 within a block, in float64 over the blocks, always in the same order. So
the result depends neither on the number of threads nor on the order in which a GPU schedules its programs.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import torch

from cl_dist.kernels import reference
from cl_dist.kernels.backend import (
    LANES,
    Launch,
    blocks,
    cpu_jit,
    cpu_part,
    fold_lanes,
    jit,
    on_amd,
    path_of,
    power_of_two,
    sent,
    tl,
)
from cl_dist.kernels.rows import counted_tokens

TOKEN_BLOCK = 32
"""Tokens that are summed in float32 before the sum continues in float64."""
SMALLEST_NORM = float(torch.finfo(torch.float32).tiny)
"""A token whose absolute outputs add up to less counts as all zeros: the reciprocal of its sum would overflow."""
WIDEST_ROW = 16384
"""Longest row, padded to a power of two, that a GPU program holds in registers, and so reads only once."""
TILE = 8192
"""Elements of a GPU program's tile, if rows are shorter than that."""
WIDE_PIECE = 2048
"""Elements of a longer row that a GPU program reads at a time."""
WIDE_TOKENS = 2
"""Tokens with longer rows that a GPU program reads at a time, twice: few enough for the cache to keep them."""
STAGES = 3
"""Tiles that a GPU program has in flight: it reads the next two while it adds up one."""
AMD_STAGES = 2
"""The same on AMD's GPUs, whose programs keep them in registers: with three, 16 to 24 waves fit on a compute unit of
CDNA 3, with two 24 (float32) or 32, depending on Triton. One tile is enough to read ahead. An MI300X reads 5.3 TB/s
with 304 compute units, so at a latency of 1 µs (assumed) each of them needs 17 KB in flight; 32 waves of bfloat16 have
64 KB, and 24 of float32 96 KB.
"""
FOLD_BYTES = 128 << 20
"""Memory for block sums that wait to be folded together. At 4,096 tokens all layers of a 7B model need 0.7 GB, so that
they take six launches instead of 224."""
FOLD_HEIGHT, FOLD_WIDTH = 16, 128
"""Blocks and rows that a GPU program folds at a time."""
CONVERTED_TOKENS = 64 * TOKEN_BLOCK
"""Tokens that the CPU path converts to float32 at a time, which bounds the temporary tensor."""
FOLD_CHUNK = 1024
"""Rows whose sums one CPU thread keeps in float64 at a time."""


def row_magnitude(
    output: torch.Tensor, token_mask: torch.Tensor | None = None, *, per_token: bool = True
) -> torch.Tensor:
    """Sum a linear layer's absolute outputs over tokens (MIGU, arXiv 2406.17245, equations 3 and 4).

    Args:
        output: `(..., out_features)`, float32, bfloat16 or float16 with any strides: the layer's output Y for all
            tokens of a micro-batch. It may be empty. float64 is rounded to float32.
        token_mask: bool, one entry per token, or broadcastable to the leading shape of `output`. Tokens marked False do
            not count, whatever they hold. None counts every token.
        per_token: Normalise each token: divide its absolute outputs by their sum. A token whose outputs are all zero
            (or add up to less than `SMALLEST_NORM`) then adds zero. False adds the absolute outputs unscaled, as the
            reference code does.

    Returns:
        `(out_features,)` float32, detached; dimensionless with `per_token`, else in the unit of the outputs. With
        `per_token` a NaN in a counted token makes every entry NaN, and an Inf makes its own row NaN. Without, a NaN or
        Inf stays in its own row.
    """
    path = path_of(output)
    if path == "torch":
        return reference.row_magnitude(output, token_mask, per_token=per_token)
    y_TO = output.detach().reshape(-1, output.shape[-1])
    counted_T = None if token_mask is None else counted_tokens(output, token_mask)
    return (_on_cpu if path == "cpu" else _on_gpu)(y_TO, counted_T, per_token)


class MagnitudeTotal:
    """Adds the row magnitudes of many outputs to one vector, with few launches on a GPU.

    There, `add` launches one kernel, which sums over blocks of tokens, and `fold` one more for all outputs since the
    last one. The numbers are the same as those of `row_magnitude` added one after the other.

    Args:
        total: `(total,)` float64: what is added to. Up to date after `fold`.
    """

    def __init__(self, total: torch.Tensor) -> None:
        self.total = total
        self._partial = torch.empty(0, dtype=torch.float32, device=total.device)
        """Sums of the blocks of all waiting outputs, in the same memory in every step."""
        self._used = 0
        self._waiting: dict[int, tuple[int, int, int, int]] = {}
        """By its first row in `total`, an output's place in `_partial`, blocks, rows, and first row."""

    def add(self, output: torch.Tensor, token_mask: torch.Tensor | None, start: int, *, per_token: bool = True) -> None:
        """Add the magnitudes of an output to `total[start : start + out_features]`; arguments as of `row_magnitude`."""
        rows = output.shape[-1]
        if path_of(output) != "triton":
            self.total[start : start + rows].add_(row_magnitude(output, token_mask, per_token=per_token))
            return
        y_TO = output.detach().reshape(-1, rows)
        counted_T = None if token_mask is None else counted_tokens(output, token_mask)
        number = blocks(len(y_TO), TOKEN_BLOCK)
        size = _padded(len(y_TO), rows)
        if start in self._waiting:  # one launch folds each row once
            self.fold()
        if self._used + size > self._partial.numel():
            self._make_room(size)
        partial_BO = self._partial[self._used : self._used + number * rows].view(number, rows)
        _sum_launch(y_TO, counted_T, per_token, partial_BO).run()
        self._waiting[start] = (self._used, number, rows, start)
        self._used += size

    def fold(self) -> torch.Tensor:
        """Add what waits to `total`, and return it."""
        if self._waiting:
            _fold_all_launch(self._partial, tuple(self._waiting.values()), self.total).run()
            self.forget()
        return self.total

    def forget(self) -> None:
        """Discard what waits."""
        self._waiting.clear()
        self._used = 0

    def _make_room(self, size: int) -> None:
        """Fold, and make the memory twice as large while it is smaller than `FOLD_BYTES`."""
        self.fold()
        larger = _larger(self._partial.numel(), size)
        if larger > self._partial.numel():
            self._partial = torch.empty(larger, dtype=torch.float32, device=self.total.device)


def fold_memory(tokens: int, rows: Sequence[int], micro_batches: int = 1) -> int:
    """Bytes that `MagnitudeTotal` holds on a GPU for block sums, once steps repeat: outputs of `rows`, in order."""
    room, before = 0, -1
    while room > before:
        before, used, waiting = room, 0, set[int]()
        for place, number in [*enumerate(rows)] * micro_batches:
            size = _padded(tokens, number)
            if place in waiting:
                used, waiting = 0, set()
            if used + size > room:
                room, used, waiting = max(room, _larger(room, size)), 0, set()
            used += size
            waiting.add(place)
    return 4 * room


def _larger(room: int, size: int) -> int:
    """What the memory for block sums grows to, in elements, where an output of `size` found no room."""
    return max(size, min(2 * room + size, FOLD_BYTES // 4))


def _padded(tokens: int, rows: int) -> int:
    """Elements of an output's block sums; every output begins at a multiple of 16 bytes."""
    return -(-blocks(tokens, TOKEN_BLOCK) * rows // 4) * 4


def _on_gpu(y_TO: torch.Tensor, counted_T: torch.Tensor | None, per_token: bool) -> torch.Tensor:
    partial_BO = torch.empty(blocks(len(y_TO), TOKEN_BLOCK), y_TO.shape[1], dtype=torch.float32, device=y_TO.device)
    total_O = torch.empty(y_TO.shape[1], dtype=torch.float32, device=y_TO.device)
    _sum_launch(y_TO, counted_T, per_token, partial_BO).run()
    _fold_launch(partial_BO, total_O).run()
    return total_O


def _sum_launch(
    y_TO: torch.Tensor, counted_T: torch.Tensor | None, per_token: bool, partial_BO: torch.Tensor
) -> Launch:
    """Launch one program per block of tokens. It holds whole rows if they fit, and otherwise loops over pieces."""
    tokens, rows = y_TO.shape
    whole = rows <= WIDEST_ROW
    width = power_of_two(rows) if whole else WIDE_PIECE
    height = max(1, min(TOKEN_BLOCK, TILE // width)) if whole else WIDE_TOKENS
    arguments = {
        "y": y_TO,
        "counted": y_TO if counted_T is None else counted_T.contiguous().view(torch.uint8),
        "partial": partial_BO,
        "tokens": tokens,
        "rows": rows,
        "token_stride": y_TO.stride(0),
        "row_stride": y_TO.stride(1),
        "SMALLEST": SMALLEST_NORM,
        "PER_TOKEN": per_token,
        "MASKED": counted_T is not None,
        "STEPS": TOKEN_BLOCK // height,
        "STAGES": AMD_STAGES if on_amd() else STAGES,
        "HEIGHT": height,
        "WIDTH": width,
    }
    # Longer rows take half as many elements a thread, because their two loops need more registers.
    warps = max(1, min(16, height * width // (1024 if whole else 512)))
    return Launch(_sum_whole_rows if whole else _sum_wide_rows, (len(partial_BO),), arguments, num_warps=warps)


def _fold_launch(partial_BO: torch.Tensor, total_O: torch.Tensor) -> Launch:
    rows = total_O.numel()
    arguments = {"partial": partial_BO, "total": total_O, "blocks": len(partial_BO), "rows": rows}
    tile = {"HEIGHT": FOLD_HEIGHT, "WIDTH": FOLD_WIDTH}
    return Launch(_fold_blocks, (blocks(rows, FOLD_WIDTH),), {**arguments, **tile}, num_warps=4)


def _fold_all_launch(
    partial: torch.Tensor, waiting: tuple[tuple[int, int, int, int], ...], total: torch.Tensor
) -> Launch:
    """Launch a program for every `FOLD_WIDTH` rows of the widest output, of each output."""
    arguments = {
        "partial": partial,
        "table": _table(waiting, partial.device),
        "total": total,
        "ALIGNED": all(rows % 4 == 0 for _, _, rows, _ in waiting),
        "HEIGHT": FOLD_HEIGHT,
        "WIDTH": FOLD_WIDTH,
    }
    widest = max(rows for _, _, rows, _ in waiting)
    return Launch(_fold_all, (len(waiting), blocks(widest, FOLD_WIDTH)), arguments, num_warps=4)


@functools.lru_cache(maxsize=16)
def _table(waiting: tuple[tuple[int, int, int, int], ...], device: torch.device) -> torch.Tensor:
    """Return `(outputs, 4)` int64; the same in every step whose batches have the same shape."""
    return sent(np.array(waiting, np.int64), device)


@jit
def _tile_of(
    y: tl.tensor,
    counted: tl.tensor,
    t_H1: tl.tensor,
    j_1W: tl.tensor,
    tokens: tl.tensor,
    rows: tl.tensor,
    token_stride: tl.tensor,
    row_stride: tl.tensor,
    MASKED: tl.constexpr,
) -> tl.tensor:
    """Load absolute outputs of some tokens and rows in float32; zero where a token does not count."""
    take = t_H1 < tokens
    if MASKED:
        take = take & (tl.load(counted + t_H1, mask=take, other=0) != 0)
    here = y + t_H1 * token_stride + j_1W.to(tl.int64) * row_stride
    return tl.abs(tl.load(here, mask=take & (j_1W < rows), other=0.0).to(tl.float32))


@jit
def _weights(
    norm_H: tl.tensor,
    SMALLEST: tl.constexpr,
) -> tl.tensor:
    """Return the reciprocal of every token's sum, or zero where the sum is practically zero; NaN stays NaN."""
    small = norm_H < SMALLEST
    return tl.where(small, 0.0, 1.0 / tl.where(small, 1.0, norm_H))


@jit
def _sum_whole_rows(
    y: tl.tensor,
    counted: tl.tensor,
    partial: tl.tensor,
    tokens: tl.tensor,
    rows: tl.tensor,
    token_stride: tl.tensor,
    row_stride: tl.tensor,
    SMALLEST: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    MASKED: tl.constexpr,
    STEPS: tl.constexpr,
    STAGES: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """Do both reductions on one read: normalise a tile's tokens and add them up while they are in registers."""
    block = tl.program_id(0).to(tl.int64)
    j_W = tl.arange(0, WIDTH)
    sums_HW = tl.zeros((HEIGHT, WIDTH), tl.float32)
    for step in tl.range(0, STEPS, num_stages=STAGES):
        t_H = (block * STEPS + step) * HEIGHT + tl.arange(0, HEIGHT)
        y_HW = _tile_of(y, counted, t_H[:, None], j_W[None, :], tokens, rows, token_stride, row_stride, MASKED)
        if PER_TOKEN:
            y_HW *= _weights(tl.sum(y_HW, axis=1), SMALLEST)[:, None]
        sums_HW += y_HW
    tl.store(partial + block * rows + j_W, tl.sum(sums_HW, axis=0), mask=j_W < rows)


@jit
def _sum_wide_rows(
    y: tl.tensor,
    counted: tl.tensor,
    partial: tl.tensor,
    tokens: tl.tensor,
    rows: tl.tensor,
    token_stride: tl.tensor,
    row_stride: tl.tensor,
    SMALLEST: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    MASKED: tl.constexpr,
    STEPS: tl.constexpr,
    STAGES: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """Do the same for rows that do not fit in registers: read a few tokens twice, the second time from the cache."""
    block = tl.program_id(0).to(tl.int64)
    for step in range(STEPS):
        t_H = (block * STEPS + step) * HEIGHT + tl.arange(0, HEIGHT)
        # First pass over the pieces: the tokens' norms.
        weight_H = tl.full((HEIGHT,), 1.0, tl.float32)
        if PER_TOKEN:
            sums_HW = tl.zeros((HEIGHT, WIDTH), tl.float32)
            for start in tl.range(0, rows, WIDTH, num_stages=STAGES):
                j_1W = start + tl.arange(0, WIDTH)[None, :]
                sums_HW += _tile_of(y, counted, t_H[:, None], j_1W, tokens, rows, token_stride, row_stride, MASKED)
            weight_H = _weights(tl.sum(sums_HW, axis=1), SMALLEST)
        # Second pass: add the normalised tokens to the block's sums in memory.
        for start in range(0, rows, WIDTH):
            j_W = start + tl.arange(0, WIDTH)
            y_HW = _tile_of(y, counted, t_H[:, None], j_W[None, :], tokens, rows, token_stride, row_stride, MASKED)
            total_W = tl.sum(y_HW * weight_H[:, None], axis=0)
            here = partial + block * rows + j_W
            if step > 0:
                total_W += tl.load(here, mask=j_W < rows)
            tl.store(here, total_W, mask=j_W < rows)
            tl.debug_barrier()


@jit
def _folded(
    partial: tl.tensor,
    j_W: tl.tensor,
    blocks: tl.tensor,
    rows: tl.tensor,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
) -> tl.tensor:
    """Add up the blocks of some rows in float64, in an order that depends only on the tile; rounded to float32."""
    sums_HW = tl.zeros((HEIGHT, WIDTH), tl.float64)
    for start in range(0, blocks, HEIGHT):
        b_H = start + tl.arange(0, HEIGHT).to(tl.int64)
        inside = (b_H < blocks)[:, None] & (j_W < rows)[None, :]
        sums_HW += tl.load(partial + b_H[:, None] * rows + j_W[None, :], mask=inside, other=0.0)
    return tl.sum(sums_HW, axis=0).to(tl.float32)


@jit
def _fold_blocks(
    partial: tl.tensor,
    total: tl.tensor,
    blocks: tl.tensor,
    rows: tl.tensor,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """Fold one output."""
    j_W = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    tl.store(total + j_W, _folded(partial, j_W, blocks, rows, HEIGHT, WIDTH), mask=j_W < rows)


@jit
def _fold_all(
    partial: tl.tensor,
    table: tl.tensor,
    total: tl.tensor,
    ALIGNED: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """Fold each output in the table, and add it to its rows of the total."""
    row = table + tl.program_id(0) * 4
    offset, blocks, rows, start = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    if ALIGNED:
        offset, rows = tl.multiple_of(offset, 4), tl.multiple_of(rows, 4)
    first = tl.program_id(1) * WIDTH
    if first < rows:
        j_W = first + tl.arange(0, WIDTH)
        sums_W = _folded(partial + offset, j_W, blocks, rows, HEIGHT, WIDTH)
        here_W = total + start + j_W
        tl.store(here_W, tl.load(here_W, mask=j_W < rows) + sums_W, mask=j_W < rows)


def _on_cpu(y_TO: torch.Tensor, counted_T: torch.Tensor | None, per_token: bool) -> torch.Tensor:
    tokens, rows = y_TO.shape
    partial_BO = np.empty((blocks(tokens, TOKEN_BLOCK), rows), np.float32)
    counted = np.empty(0, np.bool_) if counted_T is None else counted_T.contiguous().numpy()
    step = max(tokens, 1) if _is_readable(y_TO) else CONVERTED_TOKENS
    for start in range(0, tokens, step):
        bits = _bits(y_TO[start : start + step])
        first = start // TOKEN_BLOCK
        add_block = _sum_token_blocks.sized(bits.size)
        add_block(bits, counted[start : start + step], per_token, partial_BO[first : first + blocks(step, TOKEN_BLOCK)])
    total = np.empty(rows, np.float32)
    _fold.sized(partial_BO.size)(partial_BO, total)
    return torch.from_numpy(total)


def _is_readable(y_TO: torch.Tensor) -> bool:
    return y_TO.is_contiguous() and y_TO.dtype in (torch.float32, torch.bfloat16)


def _bits(y_TO: torch.Tensor) -> npt.NDArray[Any]:
    """Return the bits of float32 numbers, or of bfloat16 numbers: the upper half of float32, a type numpy lacks."""
    if not _is_readable(y_TO):
        y_TO = y_TO.to(torch.float32).contiguous()
    return y_TO.view(torch.uint16 if y_TO.dtype == torch.bfloat16 else torch.uint32).numpy()


@cpu_jit
def _sum_token_blocks(
    bits_TO: npt.NDArray[Any], counted_T: npt.NDArray[np.bool_], per_token: bool, partial_BO: npt.NDArray[np.float32]
) -> None:
    """Write each token block's sum of `|y| / norm`; an empty `counted_T` counts all tokens."""
    for b in numba.prange(partial_BO.shape[0]):
        partial_BO[b] = np.float32(0)
        for t in range(b * TOKEN_BLOCK, min((b + 1) * TOKEN_BLOCK, bits_TO.shape[0])):
            if counted_T.size == 0 or counted_T[t]:
                _add_token(bits_TO[t], per_token, partial_BO[b])


@cpu_part
def _add_token(bits_O: npt.NDArray[Any], per_token: bool, sums_O: npt.NDArray[np.float32]) -> None:
    # Shifting bfloat16 bits up by half a word gives the float32 of the same value; clearing the sign gives |y|.
    shift = np.uint32(32 - 8 * bits_O.itemsize)
    no_sign = np.uint32(0x7FFFFFFF)
    weight = np.float32(1)
    if per_token:
        lanes = np.zeros(LANES, np.float32)
        for start in range(0, bits_O.size - LANES + 1, LANES):
            some = bits_O[start : start + LANES]
            for lane in range(LANES):
                lanes[lane] += np.uint32(np.uint32(np.uint32(some[lane]) << shift) & no_sign).view(np.float32)
        norm = fold_lanes(lanes)
        for j in range(bits_O.size // LANES * LANES, bits_O.size):
            norm += np.uint32(np.uint32(np.uint32(bits_O[j]) << shift) & no_sign).view(np.float32)
        if norm < np.float32(SMALLEST_NORM):
            return
        weight = np.float32(1) / norm
    for j in range(bits_O.size):
        sums_O[j] += weight * np.uint32(np.uint32(np.uint32(bits_O[j]) << shift) & no_sign).view(np.float32)


@cpu_jit
def _fold(partial_BO: npt.NDArray[np.float32], total_O: npt.NDArray[np.float32]) -> None:
    """Add up the blocks of every row in float64, in ascending order."""
    for chunk in numba.prange((total_O.size + FOLD_CHUNK - 1) // FOLD_CHUNK):
        some = slice(chunk * FOLD_CHUNK, (chunk + 1) * FOLD_CHUNK)
        total = total_O[some]
        sums = np.zeros(total.size, np.float64)
        for b in range(partial_BO.shape[0]):
            row = partial_BO[b, some]
            for j in range(row.size):
                sums[j] += row[j]
        for j in range(total.size):
            total[j] = sums[j]
