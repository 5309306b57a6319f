"""Selects the rows to keep: those whose magnitude reaches the quantile.

Nothing is sorted. Each magnitude becomes an unsigned integer of the same order, and a radix select finds the one of the
wanted rank digit by digit, from the most significant: count the digit's values among the candidates, walk to the value
that holds the rank, and continue with the candidates that have it. One call handles all layers of a model.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numba
import numpy as np
import numpy.typing as npt
import torch

from cl_dist.kernels import reference
from cl_dist.kernels.backend import Launch, cpu_jit, cpu_part, jit, path_of, sent, tl
from cl_dist.kernels.rows import RowMask, RowMasks

CPU_DIGIT = 11
"""Bits of a digit on CPUs, where the counts must fit in the L1 cache."""
GPU_DIGIT = 8
"""Bits of a digit on GPUs, where the counts are in registers."""
BLOCK = 2048
"""Rows that a GPU program reads at a time."""


def kept_rows(rows: int, threshold: float) -> int:
    """Number of rows kept when no two magnitudes are equal: `N - ceil(T * (N - 1))`."""
    return rows - math.ceil(threshold * (rows - 1))


def topk_row_mask(magnitude: torch.Tensor, threshold: float) -> RowMask:
    """The rows of one layer that `topk_row_masks` keeps; `magnitude` is `(rows,)`."""
    return topk_row_masks(magnitude, [magnitude.numel()], threshold)[0]


def topk_row_masks(magnitudes: torch.Tensor, sizes: Sequence[int], threshold: float) -> list[RowMask]:
    """Keep the rows with `magnitude >= quantile(magnitude, threshold)` in every layer, ties at the threshold included.

    The quantile interpolates linearly, so a row reaches it exactly when it is at least as large as the entry at index
    `ceil(T * (N - 1))` of the ascending order (MIGU, arXiv 2406.17245, section 3.2). On a GPU all layers take one
    kernel launch, and the host waits for the device once, for the numbers of rows kept.

    Args:
        magnitudes: `(total,)`, float32 or float64: the layers' magnitudes one after the other. A NaN counts as larger
            than every number, as in `torch.sort`, and -0.0 equals 0.0.
        sizes: Rows per layer, each at least 1, `total` together.
        threshold: T in [0, 1].

    Returns:
        One `RowMask` per layer, whose tensors are views of two flat ones: all rows when all magnitudes are equal, never
        fewer than `kept_rows(rows, threshold)`, and every row whose magnitude is NaN.

    Raises:
        ValueError: A layer without rows, sizes that do not add up to `total`, or a threshold outside [0, 1].
        TypeError: Magnitudes that are neither float32 nor float64.
    """
    masks = flat_row_masks(magnitudes, sizes, threshold)
    return masks.split(sizes, masks.counts.tolist())


def flat_row_masks(magnitudes: torch.Tensor, sizes: Sequence[int], threshold: float) -> RowMasks:
    """Choose as `topk_row_masks` does, without waiting for the device."""
    _check(magnitudes, sizes, threshold)
    path = path_of(magnitudes)
    if path == "torch":
        return _flat(reference.topk_row_masks(magnitudes, sizes, threshold), magnitudes)
    keep = torch.empty(magnitudes.numel(), dtype=torch.bool, device=magnitudes.device)
    rows = torch.empty(magnitudes.numel(), dtype=torch.int64, device=magnitudes.device)
    layers_2L = _layers(tuple(sizes), threshold, magnitudes.device)
    choose = _choose_on_cpu if path == "cpu" else _choose_on_gpu
    return RowMasks(keep, rows, choose(magnitudes.detach().contiguous(), layers_2L, keep, rows))


def _flat(masks: Sequence[RowMask], magnitudes: torch.Tensor) -> RowMasks:
    rows = torch.empty(magnitudes.numel(), dtype=torch.int64, device=magnitudes.device)
    start = 0
    for mask in masks:
        rows[start : start + len(mask.rows)] = mask.rows
        start += len(mask.keep)
    keep = torch.cat([mask.keep for mask in masks]) if masks else torch.empty_like(rows, dtype=torch.bool)
    return RowMasks(keep, rows, torch.tensor([len(mask.rows) for mask in masks], device=rows.device))


def _check(magnitudes: torch.Tensor, sizes: Sequence[int], threshold: float) -> None:
    if magnitudes.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"magnitudes are float32 or float64, not {magnitudes.dtype}")
    if not 0 <= threshold <= 1:
        raise ValueError(f"the threshold {threshold} lies outside [0, 1]")
    if magnitudes.dim() != 1 or sum(sizes) != magnitudes.numel() or min(sizes, default=1) < 1:
        raise ValueError(f"layers of {list(sizes)} rows do not make up magnitudes of shape {tuple(magnitudes.shape)}")


@functools.lru_cache(maxsize=16)
def _layers(sizes: tuple[int, ...], threshold: float, device: torch.device) -> torch.Tensor:
    """Return `(2, layers + 1)` int64: where each layer starts (and the last one ends), and the rank of its cut."""
    starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    ranks = [size - kept_rows(size, threshold) for size in sizes]
    return sent(np.stack([starts, np.array([*ranks, 0])]), device)


def _choose_on_cpu(
    magnitudes: torch.Tensor, layers_2L: torch.Tensor, keep: torch.Tensor, rows: torch.Tensor
) -> torch.Tensor:
    counts = np.zeros(layers_2L.shape[1] - 1, np.int64)
    starts, ranks = layers_2L.numpy()
    bits = magnitudes.double().view(torch.uint64).numpy()  # exact, and in the same order
    _choose_layers.sized(bits.size)(bits, starts, ranks, keep.numpy(), rows.numpy(), counts)
    return torch.from_numpy(counts)


@cpu_jit
def _choose_layers(
    bits: npt.NDArray[np.uint64],
    starts: npt.NDArray[np.int64],
    ranks: npt.NDArray[np.int64],
    keep: npt.NDArray[np.bool_],
    rows: npt.NDArray[np.int64],
    counts: npt.NDArray[np.int64],
) -> None:
    """Write every layer's mask, its row indices from the layer's start on, and their number."""
    for layer in numba.prange(counts.size):
        some = slice(starts[layer], starts[layer + 1])
        keys = _ordered_keys(bits[some])
        cut = _key_of_rank(keys.copy(), ranks[layer])
        keep_N, rows_N = keep[some], rows[some]
        count = 0
        for j in range(keys.size):
            kept = keys[j] >= cut
            keep_N[j] = kept
            rows_N[count] = j  # overwritten by the next row where this one is not kept
            count += kept
        counts[layer] = count


@cpu_part
def _ordered_keys(bits: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Turn the bits of float64 numbers into integers of the same order; every NaN becomes the largest."""
    sign, infinity = np.uint64(1 << 63), np.uint64(0x7FF << 52)
    keys = np.empty(bits.size, np.uint64)
    for j in range(bits.size):
        size = bits[j] & ~sign
        negative = (bits[j] & sign) != 0
        keys[j] = sign - size if negative else sign + size  # both zeros become `sign`
        if size > infinity:
            keys[j] = ~np.uint64(0)
    return keys


@cpu_part
def _key_of_rank(keys: npt.NDArray[np.uint64], rank: int) -> int:
    """Return the entry at index `rank` of the ascending order; overwrites `keys`."""
    values = 1 << CPU_DIGIT
    left = keys.size
    for digit in range((64 - 1) // CPU_DIGIT, -1, -1):
        shift, low = np.uint64(digit * CPU_DIGIT), np.uint64(values - 1)
        # Count the digit's values, and find the one that holds the rank.
        counts = np.zeros(values, np.int64)
        for j in range(left):
            counts[(keys[j] >> shift) & low] += 1
        value = 0
        while rank >= counts[value]:
            rank -= counts[value]
            value += 1
        # Move the keys that have it to the front.
        candidates = 0
        for j in range(left):
            if (keys[j] >> shift) & low == np.uint64(value):
                keys[candidates] = keys[j]
                candidates += 1
        left = candidates
        if left == 1:
            break
    return keys[0]


def _choose_on_gpu(
    magnitudes: torch.Tensor, layers_2L: torch.Tensor, keep: torch.Tensor, rows: torch.Tensor
) -> torch.Tensor:
    counts = torch.empty(layers_2L.shape[1] - 1, dtype=torch.int64, device=magnitudes.device)
    _choose_launch(magnitudes, layers_2L, keep, rows, counts).run()
    return counts


def _choose_launch(
    magnitudes: torch.Tensor, layers_2L: torch.Tensor, keep: torch.Tensor, rows: torch.Tensor, counts: torch.Tensor
) -> Launch:
    """One program per layer."""
    arguments = {
        "magnitudes": magnitudes,
        "starts": layers_2L[0],
        "ranks": layers_2L[1],
        "keep": keep.view(torch.uint8),
        "rows": rows,
        "counts": counts,
        "BITS": 8 * magnitudes.element_size(),
        "DIGIT": GPU_DIGIT,
        "BLOCK": BLOCK,
    }
    return Launch(_choose_rows, (counts.numel(),), arguments, num_warps=8)


@jit
def _keys_of(
    magnitudes: tl.tensor,
    offset: tl.tensor,
    inside: tl.tensor,
    BITS: tl.constexpr,
) -> tl.tensor:
    """Integers in the order of the numbers; NaN becomes the largest, and both zeros the same."""
    x = tl.load(magnitudes + offset, mask=inside, other=0.0)
    if BITS == 64:
        bits = x.to(tl.uint64, bitcast=True)
        size = bits & 0x7FFFFFFFFFFFFFFF
        sign = tl.full(bits.shape, 0x8000000000000000, tl.uint64)
        largest = tl.full(bits.shape, 0xFFFFFFFFFFFFFFFF, tl.uint64)
    else:
        bits = x.to(tl.uint32, bitcast=True)
        size = bits & 0x7FFFFFFF
        sign = tl.full(bits.shape, 0x80000000, tl.uint32)
        largest = tl.full(bits.shape, 0xFFFFFFFF, tl.uint32)
    key = tl.where((bits & sign) != 0, sign - size, sign + size)
    return tl.where(x == x, key, largest)


@jit
def _choose_rows(
    magnitudes: tl.tensor,
    starts: tl.tensor,
    ranks: tl.tensor,
    keep: tl.tensor,
    rows: tl.tensor,
    counts: tl.tensor,
    BITS: tl.constexpr,
    DIGIT: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Find one layer's cut by radix select, then write its mask and, by a prefix sum, its row indices."""
    layer = tl.program_id(0)
    start = tl.load(starts + layer)
    size = tl.load(starts + layer + 1) - start
    rank = tl.load(ranks + layer).to(tl.int32)
    values = tl.arange(0, 1 << DIGIT)
    cut = tl.full((1,), 0, tl.uint64 if BITS == 64 else tl.uint32)  # its digits so far
    for done in tl.static_range(0, BITS, DIGIT):
        low = BITS - done - DIGIT
        # Count this digit's values among the keys that share the digits found so far.
        counts_V = tl.zeros((1 << DIGIT,), tl.int32)
        for first in range(0, size, BLOCK):
            j = first + tl.arange(0, BLOCK)
            key = _keys_of(magnitudes, start + j, j < size, BITS)
            digit = ((key >> low) & ((1 << DIGIT) - 1)).to(tl.int32)
            candidate = j < size
            if done > 0:
                candidate = candidate & ((key >> (low + DIGIT)) == cut)
            counts_V += tl.histogram(digit, 1 << DIGIT, mask=candidate)
        # The value that holds the rank is the first whose cumulative count exceeds it.
        up_to_V = tl.cumsum(counts_V, axis=0)
        below = up_to_V <= rank
        value = tl.sum(below.to(tl.int32), axis=0)
        rank -= tl.sum(tl.where(values < value, counts_V, 0), axis=0)
        cut = (cut << DIGIT) | value.to(cut.dtype)
    count = tl.zeros((), tl.int64)
    for first in range(0, size, BLOCK):
        j = first + tl.arange(0, BLOCK)
        kept = (j < size) & (_keys_of(magnitudes, start + j, j < size, BITS) >= cut)
        tl.store(keep + start + j, kept.to(tl.uint8), mask=j < size)
        place = count + tl.cumsum(kept.to(tl.int32), axis=0) - 1
        tl.store(rows + start + place, j.to(tl.int64), mask=kept)
        count += tl.sum(kept.to(tl.int32), axis=0)
    tl.store(counts + layer, count)
