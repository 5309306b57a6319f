"""Linear layers whose backward pass computes only chosen rows of the weight gradient.

MIGU knows its rows when the forward pass is over, so the products that would only be zeroed later need never be made.
The layers stay what they are (`nn.Linear`, or transformers' `Conv1D`, whose weight is transposed): each gets a
`forward` of its own on the instance, so that hooks (DeepSpeed's gather and release, PEFT's, the user's) go on working,
and taking it away again restores the layer. Experts have a forward like that in `models/experts.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from cl_dist.errors import BadInput, ClDistError
from cl_dist.kernels import masked_weight_grad

_FORWARDS = (nn.Linear.forward, Conv1D.forward)


class RowSkipper:
    """Puts the skipping forward into `layers`, and tells them their rows.

    Between `active = True` and the backward pass `choose` must be called; a backward pass without rows is an error, not
    a dense gradient. Inactive (the start), outside training and without gradients the layers run as they did before.
    Activation checkpointing, autocast and ZeRO-3 work; under `torch.compile` the layers run uncompiled.

    Args:
        layers: By name, linear layers whose weights are trained.
        mask_bias: Mask the bias's gradient along; false: it is computed whole.

    Raises:
        BadInput: A layer's forward is not its type's own, so that replacing it would change what the layer computes.
    """

    def __init__(self, layers: Mapping[str, nn.Linear | Conv1D], mask_bias: bool = True) -> None:
        for name, layer in layers.items():
            _refuse_foreign_forward(name, layer)
        self._layers = dict(layers)
        self._switch = _Switch()
        self._rows = {name: _ChosenRows(name, mask_bias) for name in layers}
        for name, layer in layers.items():
            # On the instance: DeepSpeed and PEFT look at the type, which stays what it was.
            layer.forward = _skipping_forward(  # type: ignore[method-assign]
                layer, self._switch, self._rows[name]
            )

    @property
    def active(self) -> bool:
        """Whether forward passes of training prepare for skipping rows."""
        return self._switch.active

    @active.setter
    def active(self, value: bool) -> None:
        self._switch.active = value

    def choose(self, rows: Mapping[str, torch.Tensor]) -> None:
        """Set the rows of every layer for the backward passes that follow: `(kept,)` int64, ascending, by name."""
        for name, chosen in self._rows.items():
            chosen.rows = rows[name]

    def forget(self) -> None:
        """The backward pass is over; the next one needs rows of its own."""
        for chosen in self._rows.values():
            chosen.rows = None

    def remove(self) -> None:
        """Give every layer its own forward back."""
        for layer in self._layers.values():
            layer.__dict__.pop("forward", None)


@dataclass
class _Switch:
    """One for all layers of a model."""

    active: bool = False


@dataclass
class _ChosenRows:
    """What one layer's backward pass asks for, read when it runs: forward does not know it yet."""

    name: str
    mask_bias: bool
    rows: torch.Tensor | None = None


def is_skippable(module: nn.Module) -> bool:
    """Whether `RowSkipper` takes a layer of this type: one whose forward is that of `nn.Linear` or `Conv1D`."""
    return isinstance(module, nn.Linear | Conv1D) and type(module).forward in _FORWARDS


def _refuse_foreign_forward(name: str, layer: nn.Linear | Conv1D) -> None:
    if "forward" in layer.__dict__ or type(layer).forward not in _FORWARDS:
        owner = getattr(layer.__dict__.get("forward", type(layer).forward), "__module__", "another library")
        raise BadInput(
            f"method.skip_rows: the forward of layer {name} ({type(layer).__name__}) has been replaced by {owner}, and "
            "skipping rows would replace it again; allowed for this model is method.skip_rows: false"
        )


def _skipping_forward(
    layer: nn.Linear | Conv1D, switch: _Switch, chosen: _ChosenRows
) -> Callable[[torch.Tensor], torch.Tensor]:
    if isinstance(layer, Conv1D):
        return _skipping_conv1d_forward(layer, switch, chosen)

    # Traced, backward would look for its rows while it is compiled, before they are chosen.
    @torch.compiler.disable(recursive=True, reason="the rows that backward computes are chosen anew in every step")
    def forward(input: torch.Tensor) -> torch.Tensor:
        if not (switch.active and layer.training and torch.is_grad_enabled()):
            return nn.functional.linear(input, layer.weight, layer.bias)
        result: torch.Tensor = _SkippingLinear.apply(*_autocast(input, layer.weight, layer.bias), chosen)
        return result

    return forward


def _skipping_conv1d_forward(
    layer: Conv1D, switch: _Switch, chosen: _ChosenRows
) -> Callable[[torch.Tensor], torch.Tensor]:
    # For the same reason as above.
    @torch.compiler.disable(recursive=True, reason="the rows that backward computes are chosen anew in every step")
    def forward(x: torch.Tensor) -> torch.Tensor:
        if not (switch.active and layer.training and torch.is_grad_enabled()):
            inactive: torch.Tensor = Conv1D.forward(layer, x)
            return inactive
        result: torch.Tensor = _SkippingConv1D.apply(*_autocast(x, layer.weight, layer.bias), chosen)
        return result

    return forward


def _autocast(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """Cast as autocast would inside `nn.functional.linear`; a custom function has to do it by itself.

    The casts are part of the graph, so the weight's gradient comes back in the weight's own precision.
    """
    kind = next(tensor for tensor in tensors if tensor is not None).device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(tensor if tensor is None or tensor.dtype == torch.float64 else tensor.to(dtype) for tensor in tensors)


def _own(output: torch.Tensor) -> torch.Tensor:
    """The same memory, no longer marked as a view: models may change a layer's output in place (DeBERTa does), which
    autograd forbids for views that a custom function returns.
    """
    if not output._is_view():
        return output
    owned: torch.Tensor = torch.ops.aten._unsafe_view(output, output.shape)
    return owned


class _SkippingLinear(torch.autograd.Function):
    """`Y = X W^T (+ b)`; `dX = dY W` whole, `dW[rows] = dY[:, rows]^T X` and nothing else of dW."""

    @staticmethod
    def forward(
        ctx: Any, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, chosen: _ChosenRows
    ) -> torch.Tensor:
        ctx.save_for_backward(input, weight)
        ctx.chosen = chosen
        return _own(nn.functional.linear(input, weight, bias))

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
    """`Y = X W + b`, W `(in, out)`; `dX = dY W^T` whole, `dW[:, rows] = X^T dY[:, rows]` and nothing else of dW."""

    @staticmethod
    def forward(
        ctx: Any, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, chosen: _ChosenRows
    ) -> torch.Tensor:
        ctx.save_for_backward(input, weight)
        ctx.chosen = chosen
        output = torch.addmm(bias, input.reshape(-1, input.shape[-1]), weight)
        return _own(output.view(*input.shape[:-1], weight.shape[1]))

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
    chosen: _ChosenRows, input: torch.Tensor, grad_output: torch.Tensor, needs_bias: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    if chosen.rows is None:
        raise ClDistError(f"layer {chosen.name}: backward ran before the rows of this step were chosen")
    grad_weight, grad_bias = masked_weight_grad(input, grad_output, chosen.rows, bias=needs_bias and chosen.mask_bias)
    if needs_bias and not chosen.mask_bias:
        grad_bias = grad_output.reshape(-1, grad_output.shape[-1]).sum(0)
    return grad_weight, grad_bias
