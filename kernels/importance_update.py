"""Importance of every element of a parameter, smoothed over steps, and its sum over units: one pass over memory."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch

from cl_dist.kernels import reference
from cl_dist.kernels.backend import LANES, Launch, blocks, cpu_jit, cpu_part, fold_lanes, jit, path_of, power_of_two, tl

ORDERS = {"first": 1, "second": 2, "mixed": 3}

CPU_BLOCK = 8192
"""Elements that one thread works on at a time: both states of a block stay in the cache between update and sum."""

CPU_PIECE = 2048
"""Elements summed in float32 before the sum goes on in float64."""

GPU_BLOCK = 2048
"""Elements of a GPU program: two 128-bit loads per thread and float32 tensor."""

SHORT_UNIT = 256
"""Units up to this long are summed by a pass of their own on a GPU: too many of them lie in one block."""

SHORT_TILE = 2048
"""Elements of a program of that pass."""

FOLDED = 1024
"""Blocks whose parts of a unit a GPU program adds at a time."""

CONVERTED = 1 << 18
"""Elements that are converted to float32 at a time when a tensor is of another dtype."""


@torch.no_grad()
def importance_update_(
    param: torch.Tensor,
    grad: torch.Tensor,
    smoothed: torch.Tensor,
    uncertainty: torch.Tensor,
    *,
    beta1: float = 0.85,
    beta2: float = 0.85,
    order: str = "mixed",
    start: int = 0,
    unit_length: int | None = None,
    unit_sums: torch.Tensor | None = None,
) -> None:
    """Update smoothed importance and uncertainty of a flat shard in place (KIF, arXiv 2408.05200; TaSL, 2408.09857).

    With p = param * grad, an element's importance I is |p| ("first"), |p^2| ("second") or |p - p^2 / 2| ("mixed").
    Then smoothed = beta1 smoothed + (1 - beta1) I, and with the new value
    uncertainty = beta2 uncertainty + (1 - beta2) |I - smoothed|. Arithmetic is in float32. NaN in param or grad makes
    both states NaN, and so does an infinite p where the formula has Inf - Inf; nothing is replaced.

    Args:
        param: `(numel,)`, floating: elements `[start, start + numel)` of a flattened parameter.
        grad: `(numel,)`, floating: their gradients.
        smoothed: `(numel,)`, floating: the smoothed importance, updated in place.
        uncertainty: `(numel,)`, floating: the smoothed deviation, updated in place.
        beta1: Share of the old smoothed importance, in [0, 1].
        beta2: Share of the old uncertainty, in [0, 1].
        order: "first", "second" or "mixed".
        start: Position of the shard's first element in the flattened parameter.
        unit_length: Elements of a unit: `in_features` where a unit is an output row, the parameter's numel where it is
            the whole matrix. Only with `unit_sums`.
        unit_sums: `(units,)` float64, to which the sum of smoothed * uncertainty is added, element j of the shard to
            unit `(start + j) // unit_length`. Sums do not depend on the number of threads.

    Raises:
        ValueError: Shapes, dtypes or devices that do not go together, an unknown order, a beta outside [0, 1], or a
            shard that reaches past the last unit.
    """
    _check((param, grad, smoothed, uncertainty), order, (beta1, beta2))
    _check_units(param, start, unit_length, unit_sums)
    path = path_of(param)
    if path == "torch":
        reference.importance_update_(
            param.float(),  # a product of float16 overflows
            grad.float(),
            smoothed,
            uncertainty,
            beta1=beta1,
            beta2=beta2,
            order=order,
            start=start,
            unit_length=unit_length,
            unit_sums=unit_sums,
        )
        return
    tensors = (param.detach(), grad.detach(), smoothed.detach(), uncertainty.detach())
    settings = (ORDERS[order], beta1, 1 - beta1, beta2, 1 - beta2)
    (_on_cpu if path == "cpu" else _on_gpu)(tensors, settings, start, unit_length or 1, unit_sums)


def _check(tensors: tuple[torch.Tensor, ...], order: str, betas: tuple[float, float]) -> None:
    first = tensors[0]
    shapes, dtypes = [tuple(tensor.shape) for tensor in tensors], [str(tensor.dtype) for tensor in tensors]
    if first.dim() != 1 or len(set(shapes)) > 1:
        raise ValueError(f"param, grad, smoothed and uncertainty must be flat and of one length, not {shapes}")
    if not all(tensor.is_floating_point() for tensor in tensors):
        raise ValueError(f"param, grad, smoothed and uncertainty must be floating, not {dtypes}")
    if any(tensor.device != first.device for tensor in tensors):
        raise ValueError(f"grad, smoothed and uncertainty must be on {first.device}, the device of the parameter")
    if order not in ORDERS:
        raise ValueError(f"order must be one of {', '.join(ORDERS)}, not {order!r}")
    if not all(0 <= beta <= 1 for beta in betas):
        raise ValueError(f"beta1 and beta2 must be between 0 and 1, not {betas[0]} and {betas[1]}")


def _check_units(param: torch.Tensor, start: int, unit_length: int | None, unit_sums: torch.Tensor | None) -> None:
    if (unit_length is None) != (unit_sums is None):
        raise ValueError("unit_length and unit_sums are given together or not at all")
    if start < 0 or (unit_length is not None and unit_length < 1):
        raise ValueError(f"start must be at least 0 and unit_length at least 1, not {start} and {unit_length}")
    if unit_sums is None or unit_length is None:
        return
    if unit_sums.dim() != 1 or unit_sums.dtype != torch.float64 or unit_sums.device != param.device:
        raise ValueError(f"unit_sums must be (units,) float64 on {param.device}, not {tuple(unit_sums.shape)}")
    if start + param.numel() > unit_sums.numel() * unit_length:
        raise ValueError(
            f"shard [{start}, {start + param.numel()}) is longer than {unit_sums.numel()} units of {unit_length}"
        )


def _on_cpu(
    tensors: tuple[torch.Tensor, ...],
    settings: tuple[int, float, float, float, float],
    start: int,
    unit_length: int,
    unit_sums: torch.Tensor | None,
) -> None:
    # A Python float would make the arithmetic double precision.
    order, *shares = settings[0], *(np.float32(share) for share in settings[1:])
    sums = np.empty(0) if unit_sums is None else unit_sums.numpy()
    ready = all(tensor.dtype == torch.float32 and tensor.is_contiguous() for tensor in tensors)
    step = max(1, tensors[0].numel()) if ready else CONVERTED
    for offset in range(0, tensors[0].numel(), step):
        parts = [tensor[offset : offset + step] for tensor in tensors]
        converted = [part.to(torch.float32).contiguous() for part in parts]  # the parts themselves, if ready
        update = _update.sized(converted[0].numel())
        update(*(part.numpy() for part in converted), order, *shares, start + offset, unit_length, sums)
        if not ready:
            parts[2].copy_(converted[2])
            parts[3].copy_(converted[3])


@cpu_jit
def _update(
    param: Any,
    grad: Any,
    smoothed: Any,
    uncertainty: Any,
    order: Any,
    beta1: Any,
    alpha1: Any,
    beta2: Any,
    alpha2: Any,
    start: Any,
    unit_length: Any,
    unit_sums: Any,
) -> None:
    """Update all blocks; a unit inside one block is summed there, the others from the ends of their blocks."""
    blocks = (param.size + CPU_BLOCK - 1) // CPU_BLOCK
    edges = np.zeros((blocks, 2), np.float64)
    for block in numba.prange(blocks):
        low = block * CPU_BLOCK
        high = min(low + CPU_BLOCK, param.size)
        # Slices: indexing the whole arrays with low + j keeps the loop from being vectorised.
        new, spread = smoothed[low:high], uncertainty[low:high]
        _update_block(param[low:high], grad[low:high], new, spread, order, beta1, alpha1, beta2, alpha2)
        if unit_sums.size:
            _sum_block(new, spread, start + low, unit_length, unit_sums, edges[block])
    if unit_sums.size:
        for block in range(blocks):
            low = start + block * CPU_BLOCK
            high = start + min((block + 1) * CPU_BLOCK, param.size)
            unit_sums[low // unit_length] += edges[block, 0]
            unit_sums[(high - 1) // unit_length] += edges[block, 1]


@cpu_part
def _update_block(
    param: Any, grad: Any, smoothed: Any, uncertainty: Any, order: Any, beta1: Any, alpha1: Any, beta2: Any, alpha2: Any
) -> None:
    half = np.float32(0.5)  # a Python float would make the whole loop double precision
    for j in range(param.size):
        product = param[j] * grad[j]
        if order == 1:
            importance = abs(product)
        elif order == 2:
            importance = product * product
        else:
            importance = abs(product - half * (product * product))
        smoothed[j] = beta1 * smoothed[j] + alpha1 * importance
        uncertainty[j] = beta2 * uncertainty[j] + alpha2 * abs(importance - smoothed[j])


@cpu_part
def _sum_block(smoothed: Any, uncertainty: Any, start: Any, unit_length: Any, unit_sums: Any, edges: Any) -> None:
    first, last = start // unit_length, (start + smoothed.size - 1) // unit_length
    low = 0
    for unit in range(first, last + 1):
        high = min((unit + 1) * unit_length - start, smoothed.size)
        total = _sum_unit(smoothed[low:high], uncertainty[low:high])
        if unit == first:
            edges[0] = total
        elif unit == last:
            edges[1] = total
        else:  # no other block has a part of this unit
            unit_sums[unit] += total
        low = high


@cpu_part
def _sum_unit(smoothed: Any, uncertainty: Any) -> float:
    total = 0.0
    for low in range(0, smoothed.size, CPU_PIECE):
        a, u = smoothed[low : low + CPU_PIECE], uncertainty[low : low + CPU_PIECE]
        lanes = np.zeros(LANES, np.float32)
        for start in range(0, a.size - LANES + 1, LANES):
            some_a, some_u = a[start : start + LANES], u[start : start + LANES]
            for lane in range(LANES):
                lanes[lane] += some_a[lane] * some_u[lane]
        piece = fold_lanes(lanes)
        for j in range(a.size // LANES * LANES, a.size):
            piece += a[j] * u[j]
        total += piece
    return total


def _on_gpu(
    tensors: tuple[torch.Tensor, ...],
    settings: tuple[int, float, float, float, float],
    start: int,
    unit_length: int,
    unit_sums: torch.Tensor | None,
) -> None:
    numel = tensors[0].numel()
    partial = None
    if unit_sums is not None and unit_length > SHORT_UNIT:
        partial = _partial_sums(numel, unit_length, unit_sums.device)
    _update_launch(tensors, settings, start, unit_length, partial).run()
    if unit_sums is None or numel == 0:
        return
    if partial is None:
        _short_launch(tensors[2], tensors[3], start, unit_length, unit_sums).run()
    else:
        _fold_launch(partial, numel, start, unit_length, unit_sums).run()


def _partial_sums(numel: int, unit_length: int, device: torch.device) -> torch.Tensor:
    """For each block as many sums as it can meet units, partial ones included."""
    slots = (GPU_BLOCK - 2) // unit_length + 2
    return torch.empty(blocks(numel, GPU_BLOCK), slots, dtype=torch.float32, device=device)


def _update_launch(
    tensors: tuple[torch.Tensor, ...],
    settings: tuple[int, float, float, float, float],
    start: int,
    unit_length: int,
    partial: torch.Tensor | None,
) -> Launch:
    names = ("param", "grad", "smoothed", "uncertainty")
    arguments = {
        **dict(zip(names, tensors, strict=True)),
        **{f"{name}_stride": tensor.stride(0) for name, tensor in zip(names, tensors, strict=True)},
        "partial": tensors[0] if partial is None else partial,
        "numel": tensors[0].numel(),
        "start": start,
        "unit_length": unit_length,
        **dict(zip(("beta1", "alpha1", "beta2", "alpha2"), settings[1:], strict=True)),
        "ORDER": settings[0],
        "SLOTS": 0 if partial is None else partial.shape[1],
        "BLOCK": GPU_BLOCK,
    }
    return Launch(_update_kernel, (blocks(tensors[0].numel(), GPU_BLOCK),), arguments, num_warps=8)


def _fold_launch(partial: torch.Tensor, numel: int, start: int, unit_length: int, unit_sums: torch.Tensor) -> Launch:
    arguments = {
        "partial": partial,
        "unit_sums": unit_sums,
        "numel": numel,
        "start": start,
        "unit_length": unit_length,
        "sums_stride": unit_sums.stride(0),
        "SLOTS": partial.shape[1],
        "BLOCK": GPU_BLOCK,
        "WIDTH": FOLDED,
    }
    units = (start + numel - 1) // unit_length - start // unit_length + 1
    return Launch(_fold_kernel, (units,), arguments, num_warps=4)


def _short_launch(
    smoothed: torch.Tensor, uncertainty: torch.Tensor, start: int, unit_length: int, unit_sums: torch.Tensor
) -> Launch:
    width = power_of_two(unit_length)
    arguments = {
        "smoothed": smoothed,
        "uncertainty": uncertainty,
        "unit_sums": unit_sums,
        "numel": smoothed.numel(),
        "start": start,
        "unit_length": unit_length,
        "smoothed_stride": smoothed.stride(0),
        "uncertainty_stride": uncertainty.stride(0),
        "sums_stride": unit_sums.stride(0),
        "HEIGHT": SHORT_TILE // width,
        "WIDTH": width,
    }
    units = (start + smoothed.numel() - 1) // unit_length - start // unit_length + 1
    return Launch(_short_kernel, (blocks(units, SHORT_TILE // width),), arguments, num_warps=4)


@jit
def _updated(
    param: tl.tensor,
    grad: tl.tensor,
    smoothed: tl.tensor,
    uncertainty: tl.tensor,
    inside: tl.tensor,
    beta1: tl.tensor,
    alpha1: tl.tensor,
    beta2: tl.tensor,
    alpha2: tl.tensor,
    ORDER: tl.constexpr,
) -> tl.tensor:
    """Update the elements that the pointers name and return their scores."""
    product = tl.load(param, mask=inside).to(tl.float32) * tl.load(grad, mask=inside).to(tl.float32)
    if ORDER == 1:
        importance = tl.abs(product)
    elif ORDER == 2:
        importance = product * product
    else:
        importance = tl.abs(product - 0.5 * (product * product))
    old = tl.load(smoothed, mask=inside).to(tl.float32)
    spread = tl.load(uncertainty, mask=inside).to(tl.float32)
    new = beta1 * old + alpha1 * importance
    spread = beta2 * spread + alpha2 * tl.abs(importance - new)
    tl.store(smoothed, new.to(smoothed.dtype.element_ty), mask=inside)
    tl.store(uncertainty, spread.to(uncertainty.dtype.element_ty), mask=inside)
    return new * spread


@jit
def _update_kernel(
    param: tl.tensor,
    grad: tl.tensor,
    smoothed: tl.tensor,
    uncertainty: tl.tensor,
    partial: tl.tensor,
    numel: tl.tensor,
    start: tl.tensor,
    unit_length: tl.tensor,
    param_stride: tl.tensor,
    grad_stride: tl.tensor,
    smoothed_stride: tl.tensor,
    uncertainty_stride: tl.tensor,
    beta1: tl.tensor,
    alpha1: tl.tensor,
    beta2: tl.tensor,
    alpha2: tl.tensor,
    ORDER: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Update one block, and write the sum of each unit's part in it to the block's slots."""
    block = tl.program_id(0).to(tl.int64)
    low = block * BLOCK
    j_B = tl.arange(0, BLOCK)
    at_B = low + j_B
    param += at_B * param_stride
    grad += at_B * grad_stride
    smoothed += at_B * smoothed_stride
    uncertainty += at_B * uncertainty_stride
    if low + BLOCK <= numel:  # no mask: it would narrow the loads where numel is no multiple of 16
        score_B = _updated(param, grad, smoothed, uncertainty, None, beta1, alpha1, beta2, alpha2, ORDER)
    else:
        score_B = _updated(param, grad, smoothed, uncertainty, at_B < numel, beta1, alpha1, beta2, alpha2, ORDER)
    if SLOTS > 0:
        begin = low * 0
        end = ((start + low) // unit_length + 1) * unit_length - start - low
        for slot in tl.static_range(SLOTS):
            own_B = (j_B >= begin) & (j_B < end) & (at_B < numel)
            tl.store(partial + block * SLOTS + slot, tl.sum(tl.where(own_B, score_B, 0.0), axis=0))
            begin = end
            end += unit_length


@jit
def _fold_kernel(
    partial: tl.tensor,
    unit_sums: tl.tensor,
    numel: tl.tensor,
    start: tl.tensor,
    unit_length: tl.tensor,
    sums_stride: tl.tensor,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """Add a unit's parts, in float64 and always in the same order: one program per unit."""
    unit = (start + tl.program_id(0).to(tl.int64) * unit_length) // unit_length
    low = tl.maximum(unit * unit_length - start, 0)
    high = tl.minimum((unit + 1) * unit_length - start, numel)
    total_W = tl.zeros((WIDTH,), tl.float64)
    stop = (high - 1) // BLOCK + 1
    for first in range(low // BLOCK, stop, WIDTH):
        block_W = first + tl.arange(0, WIDTH).to(tl.int64)
        slot_W = unit - (start + block_W * BLOCK) // unit_length
        total_W += tl.load(partial + block_W * SLOTS + slot_W, mask=block_W < stop, other=0.0).to(tl.float64)
    here = unit_sums + unit * sums_stride
    tl.store(here, tl.load(here) + tl.sum(total_W, axis=0))


@jit
def _short_kernel(
    smoothed: tl.tensor,
    uncertainty: tl.tensor,
    unit_sums: tl.tensor,
    numel: tl.tensor,
    start: tl.tensor,
    unit_length: tl.tensor,
    smoothed_stride: tl.tensor,
    uncertainty_stride: tl.tensor,
    sums_stride: tl.tensor,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """Sum whole units, some in each program."""
    unit_H = start // unit_length + tl.program_id(0).to(tl.int64) * HEIGHT + tl.arange(0, HEIGHT)
    j_W = tl.arange(0, WIDTH)
    at_HW = unit_H[:, None] * unit_length + j_W[None, :] - start
    inside_HW = (at_HW >= 0) & (at_HW < numel) & (j_W < unit_length)[None, :]
    a_HW = tl.load(smoothed + at_HW * smoothed_stride, mask=inside_HW, other=0.0).to(tl.float32)
    u_HW = tl.load(uncertainty + at_HW * uncertainty_stride, mask=inside_HW, other=0.0).to(tl.float32)
    total_H = tl.sum(a_HW * u_HW, axis=1).to(tl.float64)
    here_H = unit_sums + unit_H * sums_stride
    inside_H = unit_H * unit_length < start + numel
    tl.store(here_H, tl.load(here_H, mask=inside_H, other=0.0) + total_H, mask=inside_H)
