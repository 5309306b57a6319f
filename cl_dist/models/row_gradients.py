"""Autograd functions whose backward pass computes only chosen rows of the weight gradient.

MIGU knows which rows to keep once the forward pass is over, so there is no need to compute products only to zero them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from cl_dist.errors import ClDistError
from cl_dist.kernels import masked_weight_grad


@dataclass
class ChosenRows:
    """The rows that one layer's backward pass computes, set between forward and backward."""

    name: str
    mask_bias: bool
    rows: torch.Tensor | None = None


def row_skipping_linear(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, chosen: ChosenRows
) -> torch.Tensor:
    """`nn.functional.linear`, but backward computes only the chosen rows of the weight gradient.

    Args:
        input: `(..., in)`.
        weight: `(out, in)`.
        bias: `(out,)` or None.
        chosen: The rows; set them before the backward pass.

    Raises:
        ClDistError: The backward pass runs before they are set.
    """
    result: torch.Tensor = _SkippingLinear.apply(*autocast_like_linear(input, weight, bias), chosen)
    return result


def row_skipping_conv1d(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, chosen: ChosenRows
) -> torch.Tensor:
    """The same for transformers' `Conv1D`, whose `weight` is `(in, out)`: its output rows are columns."""
    result: torch.Tensor = _SkippingConv1D.apply(*autocast_like_linear(input, weight, bias), chosen)
    return result


def autocast_like_linear(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """Cast as autocast does inside `nn.functional.linear`; custom autograd functions have to do it themselves.

    The casts are part of the graph, so the weight's gradient is cast back to the weight's own precision.
    """
    kind = next(tensor for tensor in tensors if tensor is not None).device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):  # a plan runs without numbers
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(tensor if tensor is None or tensor.dtype == torch.float64 else tensor.to(dtype) for tensor in tensors)


def own_memory(output: torch.Tensor) -> torch.Tensor:
    """The same memory, no longer marked as a view. Models may modify a layer's output in place (DeBERTa does), which
    autograd forbids for views returned by a custom function.
    """
    if not output._is_view():
        return output
    owned: torch.Tensor = torch.ops.aten._unsafe_view(output, output.shape)
    return owned


class _SkippingLinear(torch.autograd.Function):
    """`Y = X W^T (+ b)`; `dX = dY W` in full, `dW[rows] = dY[:, rows]^T X`, all other rows of dW zero."""

    @staticmethod
    def forward(
        ctx: Any, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, chosen: ChosenRows
    ) -> torch.Tensor:
        ctx.save_for_backward(input, weight)
        ctx.chosen = chosen
        return own_memory(nn.functional.linear(input, weight, bias))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        needs_input, needs_weight, needs_bias, _ = ctx.needs_input_grad
        grad_input = grad_output @ weight if needs_input else None
        grad_weight = grad_bias = None
        if needs_weight or needs_bias:
            grad_weight, grad_bias = _weight_gradients(ctx.chosen, input, grad_output, needs_bias)
        return grad_input, grad_weight, grad_bias, None


class _SkippingConv1D(torch.autograd.Function):
    """`Y = X W + b`, W `(in, out)`; `dX = dY W^T` in full, `dW[:, rows] = X^T dY[:, rows]`, the rest of dW zero."""

    @staticmethod
    def forward(
        ctx: Any, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, chosen: ChosenRows
    ) -> torch.Tensor:
        ctx.save_for_backward(input, weight)
        ctx.chosen = chosen
        output = torch.addmm(bias, input.reshape(-1, input.shape[-1]), weight)
        return own_memory(output.view(*input.shape[:-1], weight.shape[1]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        needs_input, needs_weight, needs_bias, _ = ctx.needs_input_grad
        grad_input = grad_output @ weight.t() if needs_input else None
        grad_weight = grad_bias = None
        if needs_weight or needs_bias:
            transposed, grad_bias = _weight_gradients(ctx.chosen, input, grad_output, needs_bias)
            grad_weight = transposed.t().contiguous()
        return grad_input, grad_weight, grad_bias, None


def _weight_gradients(
    chosen: ChosenRows, input: torch.Tensor, grad_output: torch.Tensor, needs_bias: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    if chosen.rows is None:
        raise ClDistError(f"layer {chosen.name}: backward ran before the rows of this step were chosen")
    grad_weight, grad_bias = masked_weight_grad(input, grad_output, chosen.rows, bias=needs_bias and chosen.mask_bias)
    if needs_bias and not chosen.mask_bias:
        grad_bias = grad_output.reshape(-1, grad_output.shape[-1]).sum(0)
    return grad_weight, grad_bias
