"""Importance of every element of a parameter, smoothed over steps: one pass over memory."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch

from cl_dist.kernels import reference
from cl_dist.kernels.backend import Launch, blocks, cpu_jit, cpu_part, jit, path_of, tl

ORDERS = {"first": 1, "second": 2, "mixed": 3}

CPU_BLOCK = 8192
"""Elements that one thread works on at a time."""

GPU_BLOCK = 2048
"""Elements of a GPU program: two 128-bit loads per thread and float32 tensor."""

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
) -> None:
    """Update smoothed importance and uncertainty of a flat shard in place (KIF, arXiv 2408.05200; TaSL, 2408.09857).

    With p = param * grad, an element's importance I is |p| ("first"), |p^2| ("second") or |p - p^2 / 2| ("mixed").
    Then smoothed = beta1 smoothed + (1 - beta1) I, and with the new value
    uncertainty = beta2 uncertainty + (1 - beta2) |I - smoothed|. Arithmetic is in float32. NaN in param or grad makes
    both states NaN, and so does an infinite p where the formula has Inf - Inf; nothing is replaced.

    Args:
        param: `(numel,)`, floating: elements of a flattened parameter.
        grad: `(numel,)`, floating: their gradients.
        smoothed: `(numel,)`, floating: the smoothed importance, updated in place.
        uncertainty: `(numel,)`, floating: the smoothed deviation, updated in place.
        beta1: Share of the old smoothed importance, in [0, 1].
        beta2: Share of the old uncertainty, in [0, 1].
        order: "first", "second" or "mixed".

    Raises:
        ValueError: Shapes, dtypes or devices that do not go together, an unknown order, or a beta outside [0, 1].
    """
    _check((param, grad, smoothed, uncertainty), order, (beta1, beta2))
    path = path_of(param)
    if path == "torch":
        wide = (param.float(), grad.float())  # a product of float16 overflows
        reference.importance_update_(*wide, smoothed, uncertainty, beta1=beta1, beta2=beta2, order=order)
        return
    tensors = (param.detach(), grad.detach(), smoothed.detach(), uncertainty.detach())
    settings = (ORDERS[order], beta1, 1 - beta1, beta2, 1 - beta2)
    if path == "cpu":
        _on_cpu(tensors, settings)
    else:
        _update_launch(tensors, settings).run()


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


def _on_cpu(tensors: tuple[torch.Tensor, ...], settings: tuple[int, float, float, float, float]) -> None:
    # A Python float would make the arithmetic double precision.
    order, *shares = settings[0], *(np.float32(share) for share in settings[1:])
    ready = all(tensor.dtype == torch.float32 and tensor.is_contiguous() for tensor in tensors)
    step = max(1, tensors[0].numel()) if ready else CONVERTED
    for offset in range(0, tensors[0].numel(), step):
        parts = [tensor[offset : offset + step] for tensor in tensors]
        converted = [part.to(torch.float32).contiguous() for part in parts]  # the parts themselves, if ready
        update = _update.sized(converted[0].numel())
        update(*(part.numpy() for part in converted), order, *shares)
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
) -> None:
    """Update all blocks."""
    blocks = (param.size + CPU_BLOCK - 1) // CPU_BLOCK
    for block in numba.prange(blocks):
        low = block * CPU_BLOCK
        high = min(low + CPU_BLOCK, param.size)
        # Slices: indexing the whole arrays with low + j keeps the loop from being vectorised.
        new, spread = smoothed[low:high], uncertainty[low:high]
        _update_block(param[low:high], grad[low:high], new, spread, order, beta1, alpha1, beta2, alpha2)


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


def _update_launch(
    tensors: tuple[torch.Tensor, ...],
    settings: tuple[int, float, float, float, float],
) -> Launch:
    names = ("param", "grad", "smoothed", "uncertainty")
    arguments = {
        **dict(zip(names, tensors, strict=True)),
        **{f"{name}_stride": tensor.stride(0) for name, tensor in zip(names, tensors, strict=True)},
        "numel": tensors[0].numel(),
        **dict(zip(("beta1", "alpha1", "beta2", "alpha2"), settings[1:], strict=True)),
        "ORDER": settings[0],
        "BLOCK": GPU_BLOCK,
    }
    return Launch(_update_kernel, (blocks(tensors[0].numel(), GPU_BLOCK),), arguments, num_warps=8)


@jit
def _update_elements(
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
) -> None:
    """Update the elements that the pointers name."""
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


@jit
def _update_kernel(
    param: tl.tensor,
    grad: tl.tensor,
    smoothed: tl.tensor,
    uncertainty: tl.tensor,
    numel: tl.tensor,
    param_stride: tl.tensor,
    grad_stride: tl.tensor,
    smoothed_stride: tl.tensor,
    uncertainty_stride: tl.tensor,
    beta1: tl.tensor,
    alpha1: tl.tensor,
    beta2: tl.tensor,
    alpha2: tl.tensor,
    ORDER: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Update one block."""
    block = tl.program_id(0).to(tl.int64)
    low = block * BLOCK
    at_B = low + tl.arange(0, BLOCK)
    param += at_B * param_stride
    grad += at_B * grad_stride
    smoothed += at_B * smoothed_stride
    uncertainty += at_B * uncertainty_stride
    if low + BLOCK <= numel:  # no mask: it would narrow the loads where numel is no multiple of 16
        _update_elements(param, grad, smoothed, uncertainty, None, beta1, alpha1, beta2, alpha2, ORDER)
    else:
        _update_elements(param, grad, smoothed, uncertainty, at_B < numel, beta1, alpha1, beta2, alpha2, ORDER)
