"""One step of AdamW on the rows that a mask keeps: masters and both moments in one pass, with torch's bits.

Torch's fused AdamW steps whole tensors. A dropped row can then only be saved before the step and restored after it,
which costs more than the step. Here a dropped row is neither read nor written.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numba
import numpy as np
import numpy.typing as npt
import torch
from numba.extending import intrinsic

from cl_dist.kernels.backend import Launch, blocks, cpu_jit, cpu_part, jit, path_of, sent, tl
from cl_dist.kernels.rows import RowLayout

CACHE_LINE = 64
"""Bytes; torch's CPU kernel divides a tensor among threads by cache lines, so that all but the last one is stepped by
vector instructions. What follows the last whole vector is stepped element by element, which rounds differently."""

CPU_BLOCK = 8192
"""Elements that one thread works on at a time where all elements are stepped."""

GPU_BYTES = 4096
"""Bytes of each tensor that a GPU program covers."""

COMPACT = 1 << 18
"""Elements that are copied together at a time where torch's own operation steps them."""


class AdamWSettings(NamedTuple):
    """What torch's AdamW calls `lr`, `betas`, `eps` and `weight_decay`."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float


class AdamWState(NamedTuple):
    """The flat tensors of a step, each `(numel,)`, contiguous, of one dtype and device; the gradient is only read."""

    param: torch.Tensor
    grad: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor

    def narrow(self, start: int, numel: int) -> AdamWState:
        """View elements `[start, start + numel)`."""
        return AdamWState(*(tensor.narrow(0, start, numel) for tensor in self))


class RowPiece(NamedTuple):
    """A piece of the flat tensors, and which of its elements are stepped."""

    offset: int
    """Its first element in the flat tensors."""
    numel: int
    start: int = 0
    """Its first element in the flattened parameter."""
    layout: RowLayout | None = None
    """How the parameter stores its rows; None: there are none, all elements are stepped."""
    keep: torch.Tensor | None = None
    """`(layout.total,)` bool on the tensors' device; True steps a row."""

    def kept(self, first: int, numel: int) -> torch.Tensor:
        """Which of the elements `[first, first + numel)` of the flat tensors, all in this piece, are stepped."""
        if self.layout is None or self.keep is None:
            return torch.ones(numel, dtype=torch.bool)
        at = torch.arange(numel, device=self.keep.device) + (first - self.offset + self.start)
        if self.layout.columns:
            size = self.layout.rows * self.layout.length
            return self.keep[at // size * self.layout.rows + at % self.layout.rows]
        return self.keep[at // self.layout.length]


@torch.no_grad()
def adamw_rows_(state: AdamWState, step: torch.Tensor, pieces: Sequence[RowPiece], settings: AdamWSettings) -> None:
    """Step the kept elements of `pieces`, in place; all other elements of parameter and moments keep their bits.

    The result is that of torch's fused AdamW (decoupled weight decay, no AMSGrad) on the whole flat tensors, followed
    by putting back what is not kept: bit for bit on CPUs, whose arithmetic is compared with torch's in this process
    before it is used. Nothing waits for a GPU.

    Args:
        state: Flat parameter, gradient and moments.
        step: Scalar, floating, on their device: AdamW's step count, this step included.
        pieces: Which elements are stepped. Pieces do not overlap; what is in none of them is not stepped.
        settings: Of the optimiser.

    Raises:
        ValueError: Tensors that do not go together, or a piece that lies outside them or its parameter.
    """
    _check(state, pieces)
    if path_of(state.param) == "triton":
        _on_gpu(state, step, pieces, settings)
        return
    tail = _Tail(state, step, pieces, settings) if state.param.device.type == "cpu" else None
    variant = _variant_like_torch() if state.param.dtype == torch.float32 and path_of(state.param) == "cpu" else None
    for piece in pieces:
        if variant is None:
            _compacted(state, step, piece, settings)
        else:
            _on_cpu(state, float(step), piece, settings, variant)
    if tail is not None:
        tail.write()


def _check(state: AdamWState, pieces: Sequence[RowPiece]) -> None:
    first = state.param
    for tensor in state:
        if tensor.dim() != 1 or not tensor.is_contiguous() or tensor.shape != first.shape:
            raise ValueError("param, grad and moments must be flat, contiguous and of one length")
        if tensor.dtype != first.dtype or tensor.device != first.device:
            raise ValueError("param, grad and moments must be of one dtype and on one device")
    for piece in pieces:
        if piece.offset < 0 or piece.numel < 0 or piece.offset + piece.numel > first.numel():
            raise ValueError(f"[{piece.offset}, {piece.offset + piece.numel}) is no piece of {first.numel()} elements")
        if piece.layout is not None and piece.keep is not None:
            total = piece.layout.total
            if piece.keep.numel() != total or piece.start + piece.numel > total * piece.layout.length:
                raise ValueError(f"a piece that ends at {piece.start + piece.numel} of {total} rows, with a mask for "
                                 f"{piece.keep.numel()}")  # fmt: skip


class _Tail:
    """The last, incomplete cache line of the flat tensors, stepped by torch itself on a copy."""

    def __init__(
        self, state: AdamWState, step: torch.Tensor, pieces: Sequence[RowPiece], settings: AdamWSettings
    ) -> None:
        numel = state.param.numel()
        self._numel = numel % (CACHE_LINE // state.param.element_size())
        self._start = numel - self._numel
        self._pieces = [piece for piece in pieces if piece.offset + piece.numel > self._start] if self._numel else []
        self._state = state
        if self._pieces:
            self._stepped = AdamWState(*(tensor.clone() for tensor in state.narrow(self._start, self._numel)))
            _by_torch([self._stepped], step, settings)

    def write(self) -> None:
        """Copy what is kept of it into the state."""
        for piece in self._pieces:
            first, stop = max(piece.offset, self._start), piece.offset + piece.numel
            kept = piece.kept(first, stop - first)
            for live, new in zip(self._state, self._stepped.narrow(first - self._start, stop - first), strict=True):
                part = live[first:stop]
                part.copy_(torch.where(kept, new.narrow(0, 0, stop - first), part))


def _by_torch(states: Sequence[AdamWState], step: torch.Tensor, settings: AdamWSettings) -> None:
    """Step whole tensors with torch's own operation."""
    torch._fused_adamw_(
        [state.param for state in states],
        [state.grad for state in states],
        [state.exp_avg for state in states],
        [state.exp_avg_sq for state in states],
        [],
        [step] * len(states),
        lr=settings.lr,
        beta1=settings.beta1,
        beta2=settings.beta2,
        weight_decay=settings.weight_decay,
        eps=settings.eps,
        amsgrad=False,
        maximize=False,
    )


def _compacted(state: AdamWState, step: torch.Tensor, piece: RowPiece, settings: AdamWSettings) -> None:
    """Copy kept elements together, let torch step whole cache lines of them, and copy them back.

    Exact for every dtype and build of torch, because there is no arithmetic of ours.
    """
    for first in range(piece.offset, piece.offset + piece.numel, COMPACT):
        numel = min(COMPACT, piece.offset + piece.numel - first)
        at = piece.kept(first, numel).nonzero().flatten().to(state.param.device) + first
        lines = blocks(len(at) * state.param.element_size(), CACHE_LINE) * CACHE_LINE // state.param.element_size()
        copies = AdamWState(*(tensor.new_zeros(lines) for tensor in state))
        for copy, tensor in zip(copies, state, strict=True):
            torch.index_select(tensor, 0, at, out=copy[: len(at)])
        _by_torch([copies], step, settings)
        for copy, tensor in zip(copies, state, strict=True):
            if tensor is not state.grad:
                tensor.index_copy_(0, at, copy[: len(at)])


class _Variant(NamedTuple):
    """Which products a build of torch adds without rounding them first (fused multiply-add)."""

    fused_average: bool
    fused_square: bool


@cache
def _variant_like_torch() -> _Variant | None:
    """Find the arithmetic that gives torch's bits on this processor; None if no variant does.

    It depends on the processor's instructions and on torch's compiler.
    """
    numbers = np.random.default_rng(0)
    drawn = [numbers.standard_normal(4096, np.float32) for _ in range(4)]
    drawn[3] = np.square(drawn[3])
    right = AdamWState(*(torch.from_numpy(each.copy()) for each in drawn))
    settings, step = AdamWSettings(1e-2, 0.9, 0.99, 1e-3, 0.1), torch.tensor(3.0)
    _by_torch([right], step, settings)
    for variant in (_Variant(True, True), _Variant(False, False), _Variant(True, False), _Variant(False, True)):
        ours = AdamWState(*(torch.from_numpy(each.copy()) for each in drawn))
        _on_cpu(ours, float(step), RowPiece(0, 4096), settings, variant)
        if all(map(torch.equal, ours, right)):
            return variant
    return None


def _on_cpu(state: AdamWState, step: float, piece: RowPiece, settings: AdamWSettings, variant: _Variant) -> None:
    arrays = [tensor.detach().numpy() for tensor in state.narrow(piece.offset, piece.numel)]
    numbers = (*_numbers(settings, step), *variant)
    if piece.layout is None or piece.keep is None:
        every = np.ones(blocks(piece.numel, CPU_BLOCK), np.bool_)
        _step_rows.sized(piece.numel)(*arrays, every, 0, CPU_BLOCK, *numbers)
        return
    keep = piece.keep.contiguous().numpy()
    if not piece.layout.columns:
        _step_rows.sized(piece.numel)(*arrays, keep, piece.start, piece.layout.length, *numbers)
        return
    for segment in piece.layout.segments(piece.start, piece.numel):
        part = slice(segment.offset, segment.offset + segment.rows * segment.width)
        rows = keep[segment.row : segment.row + segment.rows]
        _step_columns.sized(piece.numel)(*(array[part] for array in arrays), rows, *numbers)


def _numbers(settings: AdamWSettings, step: float) -> tuple[np.float32, ...]:
    """What torch computes in double precision before it rounds to the tensors' dtype, in the order of the kernels."""
    correction1 = 1 - settings.beta1**step
    correction2 = 1 - settings.beta2**step
    doubles = (
        1 - settings.lr * settings.weight_decay,
        1 - settings.beta1,
        settings.beta2,
        1 - settings.beta2,
        math.sqrt(correction2),
        settings.eps,
        -(settings.lr / correction1),
    )
    return tuple(np.float32(number) for number in doubles)


def _multiply_add(context: Any, a: Any, b: Any, c: Any) -> Any:
    """Multiply and add with one rounding; numba itself never fuses the two."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fma(*arguments)

    return a(a, b, c), generate


_fma: Any = intrinsic(_multiply_add)


@cpu_jit
def _step_rows(
    param: npt.NDArray[np.float32],
    grad: npt.NDArray[np.float32],
    average: npt.NDArray[np.float32],
    square: npt.NDArray[np.float32],
    keep: npt.NDArray[np.bool_],
    start: int,
    length: int,
    decay: Any,
    share1: Any,
    beta2: Any,
    share2: Any,
    correction: Any,
    eps: Any,
    rate: Any,
    fused_average: Any,
    fused_square: Any,
) -> None:
    """Step the kept rows of a piece; the first and the last one may be partial."""
    first = start // length
    for n in numba.prange((start + param.size + length - 1) // length - first):
        if keep[first + n]:
            row = (first + n) * length - start  # negative for a first row that begins before the piece
            low, high = max(row, 0), min(row + length, param.size)
            # Slices: indexing the whole arrays keeps the loop from being vectorised.
            _step_elements(
                param[low:high], grad[low:high], average[low:high], square[low:high],
                decay, share1, beta2, share2, correction, eps, rate, fused_average, fused_square,
            )  # fmt: skip


@cpu_part
def _step_elements(
    param: Any, grad: Any, average: Any, square: Any, decay: Any, share1: Any, beta2: Any, share2: Any,
    correction: Any, eps: Any, rate: Any, fused_average: Any, fused_square: Any,
) -> None:  # fmt: skip
    for j in range(param.size):
        param[j], average[j], square[j] = _stepped(
            param[j], grad[j], average[j], square[j],
            decay, share1, beta2, share2, correction, eps, rate, fused_average, fused_square,
        )  # fmt: skip


@cpu_part
def _stepped(
    p: Any, g: Any, average: Any, square: Any, decay: Any, share1: Any, beta2: Any, share2: Any,
    correction: Any, eps: Any, rate: Any, fused_average: Any, fused_square: Any,
) -> Any:  # fmt: skip
    """Torch's operations in torch's order (aten/src/ATen/native/cpu/FusedAdamKernel.cpp)."""
    p = p * decay
    # torch.lerp, which starts from the nearer end.
    near = share1 < np.float32(0.5)
    base = average if near else g
    weight = share1 if near else share1 - np.float32(1)
    away = g - average
    average = _fma(weight, away, base) if fused_average else base + weight * away
    product = share2 * g
    square = _fma(product, g, square * beta2) if fused_square else square * beta2 + product * g
    return p + rate * average / (np.sqrt(square) / correction + eps), average, square


@cpu_jit
def _step_columns(
    param: npt.NDArray[np.float32],
    grad: npt.NDArray[np.float32],
    average: npt.NDArray[np.float32],
    square: npt.NDArray[np.float32],
    keep: npt.NDArray[np.bool_],
    decay: Any,
    share1: Any,
    beta2: Any,
    share2: Any,
    correction: Any,
    eps: Any,
    rate: Any,
    fused_average: Any,
    fused_square: Any,
) -> None:
    """Step the kept columns of whole stored lines, one element for each column."""
    columns = keep.size
    for line in numba.prange(param.size // columns):
        low, high = line * columns, (line + 1) * columns
        p, g, m, v = param[low:high], grad[low:high], average[low:high], square[low:high]
        for j in range(columns):
            if keep[j]:
                p[j], m[j], v[j] = _stepped(
                    p[j], g[j], m[j], v[j],
                    decay, share1, beta2, share2, correction, eps, rate, fused_average, fused_square,
                )  # fmt: skip


def _on_gpu(state: AdamWState, step: torch.Tensor, pieces: Sequence[RowPiece], settings: AdamWSettings) -> None:
    masked = [piece for piece in pieces if piece.layout is not None and piece.keep is not None and piece.numel]
    whole = [state.narrow(piece.offset, piece.numel) for piece in pieces if piece not in masked and piece.numel]
    if whole:
        _by_torch(whole, step, settings)
    numbers = _numbers_on_device(step, settings) if masked else step
    for piece in masked:
        _launch(state, piece, numbers).run()


def _numbers_on_device(step: torch.Tensor, settings: AdamWSettings) -> torch.Tensor:
    """`(8,)` float64 for the kernel; the step count stays on the device."""
    lr, beta1, beta2, eps, decay = settings
    known = sent(np.array([lr, beta1, beta2, eps, lr * decay, 1 - beta1, 1 - beta2]), step.device)
    return torch.cat([known[3:5], known[1:3], known[5:7], known[:1], step.double().reshape(1)])


def _launch(state: AdamWState, piece: RowPiece, numbers: torch.Tensor) -> Launch:
    """Let each program cover a run of elements, in groups that lie in one row and are 16 bytes wide if they can be."""
    assert piece.layout is not None
    assert piece.keep is not None
    layout = piece.layout
    inside = 1 if layout.columns else layout.length
    wide = max(1, 16 // state.param.element_size())
    group = math.gcd(wide, piece.offset, piece.start, inside, piece.numel)
    block = GPU_BYTES // state.param.element_size()
    arguments = {
        **state._asdict(),
        "keep": piece.keep.contiguous().view(torch.uint8),
        "numbers": numbers,
        "offset": piece.offset,
        "start": piece.start,
        "numel": piece.numel,
        "rows": layout.rows,
        "length": layout.length,
        "COLUMNS": layout.columns,
        "GROUPS": block // group,
        "GROUP": group,
    }
    return Launch(_step_kernel, (blocks(piece.numel, block),), arguments, num_warps=4)


@jit
def _step_kernel(
    param: tl.tensor,
    grad: tl.tensor,
    exp_avg: tl.tensor,
    exp_avg_sq: tl.tensor,
    keep: tl.tensor,
    numbers: tl.tensor,
    offset: tl.tensor,
    start: tl.tensor,
    numel: tl.tensor,
    rows: tl.tensor,
    length: tl.tensor,
    COLUMNS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
) -> None:
    """Step the kept elements of a block as torch does (aten/src/ATen/native/cuda/fused_adam_utils.cuh).

    Settings are in double precision, tensors in single.
    """
    eps, decay = tl.load(numbers), tl.load(numbers + 1)
    beta1, beta2 = tl.load(numbers + 2), tl.load(numbers + 3)
    share1, share2 = tl.load(numbers + 4), tl.load(numbers + 5)
    lr, count = tl.load(numbers + 6), tl.load(numbers + 7)
    correction1 = (1.0 - tl.exp2(count * tl.log2(beta1))).to(tl.float32)
    root2 = tl.sqrt(1.0 - tl.exp2(count * tl.log2(beta2))).to(tl.float32)
    rate = (lr / correction1.to(tl.float64)).to(tl.float32)

    piece = tl.program_id(0).to(tl.int64) * (GROUPS * GROUP)
    i_G1 = (tl.arange(0, GROUPS) * GROUP)[:, None]
    exists_G1 = piece + i_G1 < numel
    at_G1 = start + piece + i_G1
    row_G1 = at_G1 // (rows * length) * rows + at_G1 % rows if COLUMNS else at_G1 // length
    kept_G1 = tl.load(keep + row_G1, mask=exists_G1, other=0)
    i_GE = i_G1 + tl.arange(0, GROUP)[None, :]
    kept_GE = tl.broadcast_to(exists_G1 & (kept_G1 != 0), (GROUPS, GROUP))
    place = offset + piece
    p = tl.load(param + place + i_GE, mask=kept_GE, other=0.0).to(tl.float32)
    g = tl.load(grad + place + i_GE, mask=kept_GE, other=0.0).to(tl.float32)
    m = tl.load(exp_avg + place + i_GE, mask=kept_GE, other=0.0).to(tl.float32)
    v = tl.load(exp_avg_sq + place + i_GE, mask=kept_GE, other=0.0).to(tl.float32)
    p64, g64 = p.to(tl.float64), g.to(tl.float64)
    p = (p64 - decay * p64).to(tl.float32)
    m = (beta1 * m.to(tl.float64) + share1 * g64).to(tl.float32)
    v = (beta2 * v.to(tl.float64) + share2 * g64 * g64).to(tl.float32)
    root = tl.div_rn(tl.sqrt_rn(v), tl.zeros_like(v) + root2)
    denominator = (root.to(tl.float64) + eps).to(tl.float32)
    p = p - tl.div_rn(rate * m, denominator)
    tl.store(param + place + i_GE, p.to(param.dtype.element_ty), mask=kept_GE)
    tl.store(exp_avg + place + i_GE, m.to(exp_avg.dtype.element_ty), mask=kept_GE)
    tl.store(exp_avg_sq + place + i_GE, v.to(exp_avg_sq.dtype.element_ty), mask=kept_GE)
