"""Exposes the outputs of each expert's projections, and restricts backward to chosen rows of each expert.

transformers stores the experts of a mixture as three-dimensional parameters and multiplies them inside a single
forward, where no hook can see the output of a projection. `ExpertsTap` replaces that forward on the instance by one
that computes the same: sort the tokens by expert, multiply each expert's share, weight the outputs and put them back in
order. While the tap is inactive, transformers' own forward runs, whichever implementation is configured there.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.hooks import RemovableHandle

from cl_dist.errors import BadInput, ClDistError
from cl_dist.kernels import masked_weight_grad


@dataclass(frozen=True)
class Routed:
    """The output of one projection in one forward pass; S = tokens x experts per token."""

    output: torch.Tensor
    """`(S, rows)`, sorted by expert."""
    per_expert: Sequence[int]
    """Number of outputs of each expert."""
    token: torch.Tensor
    """`(S,)` int64: the token of each output, as a position in the flattened input."""
    experts: torch.Tensor
    """`(S,)` int64: the expert of each output, ascending."""
    leading: torch.Size
    """Leading shape of the input."""


Observe = Callable[[str, Routed], None]
"""Called with a projection's name and its output."""


class ExpertsTap:
    """Replaces the forward of one module of experts by one that can be observed.

    Args:
        name: The module's name, for messages.
        module: Experts as recognised by `models.layer_kinds.is_experts`.
        observe: Called twice in each training forward pass while `active`.
        mask_bias: Mask the gradients of the biases along with the weights'.
        enter: Called before every forward pass with the leading shape of the input.

    Raises:
        BadInput: The module's forward has already been replaced.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        observe: Observe,
        mask_bias: bool = True,
        enter: Callable[[torch.Size], None] | None = None,
    ) -> None:
        if "forward" in module.__dict__:
            raise BadInput(
                f"method.untracked: another library has replaced the forward of {name} ({type(module).__name__}), "
                "which hides the outputs of its experts; use the forward of transformers"
            )
        self.active = False
        """Whether forward passes of training are observed."""
        self.rows: dict[str, list[torch.Tensor]] | None = None
        """By projection, chosen rows of each expert, `(kept,)` int64; set before a backward pass that skips rows."""
        self.skips = False
        """Whether backward computes only the chosen rows."""
        self._name, self._observe, self._mask_bias = name, observe, mask_bias
        self._module: Any = module  # has the attributes of the experts interface
        self._signature = inspect.signature(type(module).forward)
        module.forward = self._forward
        self._entering = None if enter is None else _on_entry(module, enter)

    def remove(self) -> None:
        """Restore the module's own forward."""
        self._module.__dict__.pop("forward", None)
        if self._entering is not None:
            self._entering.remove()

    @torch.compiler.disable(recursive=True, reason="how many tokens an expert gets is only known in the forward pass")
    def _forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        module = self._module
        if not (self.active and module.training and torch.is_grad_enabled()):
            result: torch.Tensor = type(module).forward(module, *args, **kwargs)
            return result
        bound = list(self._signature.bind(module, *args, **kwargs).arguments.values())
        return self._compute(*bound[1:4])

    def _compute(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Compute what `grouped_mm_experts_forward` of transformers defines.

        Args:
            hidden: `(..., in)`.
            index: `(tokens, k)`, the experts of each token.
            weights: `(tokens, k)`, the factors of their outputs.
        """
        module, k = self._module, index.shape[-1]

        # Sort the S = tokens x k inputs by expert, so that each expert has one contiguous run.
        flat = hidden.reshape(-1, hidden.shape[-1])
        experts, order = torch.sort(index.reshape(-1), stable=True)
        per_expert = torch.bincount(experts, minlength=module.num_experts).tolist()
        if len(per_expert) > module.num_experts:
            raise ClDistError(f"{self._name}: a token was routed to an expert that does not exist")
        token = order // k

        def project(projection: str, inputs: torch.Tensor) -> torch.Tensor:
            output = self._project(projection, inputs, per_expert)
            self._observe(projection, Routed(output.detach(), per_expert, token, experts, hidden.shape[:-1]))
            return output

        # Run the experts: up (with its gate), activation, down.
        if module.has_gate:
            inner = module._apply_gate(project("gate_up_proj", flat[token]))
        else:
            inner = module.act_fn(project("up_proj", flat[token]))
        outer = project("down_proj", inner)
        if getattr(module, "has_post_expert_norm", False):
            outer = module.post_expert_norm(outer)

        # Weight the outputs, put them back in the tokens' order, and add up the k of each token.
        weighted = outer * weights.reshape(-1)[order].unsqueeze(-1)
        back = torch.empty_like(order)
        back[order] = torch.arange(order.numel(), device=order.device)
        summed = weighted[back].view(*flat.shape[:-1], k, -1).sum(-2)
        return summed.to(hidden.dtype).view(*hidden.shape[:-1], -1)

    def _project(self, projection: str, inputs: torch.Tensor, per_expert: Sequence[int]) -> torch.Tensor:
        module = self._module
        bias = getattr(module, f"{projection}_bias") if module.has_bias else None
        weight = getattr(module, projection)
        result: torch.Tensor = _GroupedLinear.apply(
            inputs.to(weight.dtype), weight, bias, per_expert, bool(module.is_transposed), self, projection
        )
        return result

    def chosen(self, projection: str) -> list[torch.Tensor] | None:
        """The rows of each expert that the current backward pass computes; None: all of them."""
        if not self.skips:
            return None
        if self.rows is None:
            raise ClDistError(f"layer {self._name}: backward ran before the rows of this step were chosen")
        return self.rows[projection]

    @property
    def mask_bias(self) -> bool:
        """Whether the gradients of the biases are masked too."""
        return self._mask_bias


def _on_entry(module: nn.Module, enter: Callable[[torch.Size], None]) -> RemovableHandle:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else next(iter(kwargs.values()))
        enter(hidden.shape[:-1])

    return module.register_forward_pre_hook(hook, with_kwargs=True)


class _GroupedLinear(torch.autograd.Function):
    """`Y_e = X_e W_e^T (+ b_e)` for each expert's run of sorted inputs; backward computes the chosen rows of dW_e."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        per_expert: Sequence[int],
        transposed: bool,
        tap: ExpertsTap,
        projection: str,
    ) -> torch.Tensor:
        # Save the parameter itself: under ZeRO-3 a view would keep the gathered weight alive.
        ctx.save_for_backward(inputs, weight)
        ctx.per_expert, ctx.transposed, ctx.tap, ctx.projection = per_expert, transposed, tap, projection
        matrices = weight if transposed else weight.transpose(1, 2)
        outputs = [
            piece @ matrices[number] if bias is None else torch.addmm(bias[number], piece, matrices[number])
            for number, piece in enumerate(inputs.split(list(per_expert)))
            if len(piece)
        ]
        return torch.cat(outputs) if outputs else inputs.new_zeros(0, matrices.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        needs_input, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        matrices = weight.transpose(1, 2) if ctx.transposed else weight  # (experts, rows, in)
        chosen = ctx.tap.chosen(ctx.projection) if needs_weight or needs_bias else None
        grad_input = torch.empty_like(inputs) if needs_input else None
        grad_weight = torch.zeros_like(weight) if needs_weight else None
        grad_bias = weight.new_zeros(matrices.shape[:2]) if needs_bias else None
        start = 0
        for number, count in enumerate(ctx.per_expert):
            if not count:
                continue  # no token was routed here: the gradient stays zero
            here = slice(start, start + count)
            start += count
            if grad_input is not None:
                torch.mm(grad_output[here], matrices[number], out=grad_input[here])
            own = None if grad_weight is None else grad_weight[number]
            _write_gradients(
                own.t() if own is not None and ctx.transposed else own,
                None if grad_bias is None else grad_bias[number],
                inputs[here],
                grad_output[here],
                None if chosen is None else chosen[number],
                ctx.tap.mask_bias,
            )
        return grad_input, grad_weight, grad_bias, None, None, None, None


def _write_gradients(
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    inputs: torch.Tensor,
    grad_output: torch.Tensor,
    rows: torch.Tensor | None,
    mask_bias: bool,
) -> None:
    """Write one expert's gradients into zeros.

    Args:
        weight: Gradient of the weight, `(rows, in)`, possibly a transposed view; None: not needed.
        bias: Gradient of the bias, `(rows,)`; None: not needed.
        inputs: `(tokens, in)`.
        grad_output: `(tokens, rows)`.
        rows: The chosen rows, `(kept,)` int64; None: all.
        mask_bias: Restrict the bias to the chosen rows, too.
    """
    masks_bias = bias is not None and mask_bias and rows is not None
    if weight is not None and rows is None:
        weight.copy_(grad_output.t() @ inputs)
    elif weight is not None and rows is not None:
        masked_weight_grad(inputs, grad_output, rows, weight, bias if masks_bias else None, bias=masks_bias)
    if bias is not None and not (masks_bias and weight is not None):
        sums = grad_output.sum(0)
        if masks_bias:
            bias[rows] = sums[rows]
        else:
            bias.copy_(sums)
