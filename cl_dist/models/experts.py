"""Experts whose projections show their outputs, and whose backward pass computes chosen rows of each expert alone.

transformers keeps the experts of a mixture as parameters of three dimensions and multiplies them inside one forward,
where no hook sees what a projection puts out. `ExpertsTap` puts a forward of its own on the instance, which computes
the same: tokens sorted by expert, each expert's rows multiplied, outputs weighted and put back in order. Where it is
not asked to look, transformers' own forward runs, whichever implementation is chosen there.
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
    """What a projection has computed in one forward pass, S = tokens x experts per token."""

    output: torch.Tensor
    """`(S, rows)`, sorted by expert."""
    per_expert: Sequence[int]
    """How many of them belong to each expert."""
    token: torch.Tensor
    """`(S,)` int64: each one's token, a position in the flattened tokens that came in."""
    experts: torch.Tensor
    """`(S,)` int64: each one's expert, ascending."""
    leading: torch.Size
    """Leading shape of the tokens that came in."""


Observe = Callable[[str, Routed], None]
"""Called with the projection's name and what it has put out."""


class ExpertsTap:
    """Puts the observing forward into one module of experts.

    Args:
        name: The module's name, for messages.
        module: Experts as `models.layer_kinds.is_experts` knows them.
        observe: Called twice in each forward pass of training while `active`.
        mask_bias: Mask the biases' gradients along with the rows that are skipped.
        enter: Called before every forward pass with the leading shape of the tokens that come in; None: nobody asks.

    Raises:
        BadInput: The module's forward has been replaced already.
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
                f"method.untracked: the forward of {name} ({type(module).__name__}) has been replaced by another "
                "library, so that its experts' outputs cannot be seen; use transformers' own"
            )
        self.active = False
        """Whether forward passes of training are observed."""
        self.rows: dict[str, list[torch.Tensor]] | None = None
        """While rows are skipped: by projection, each expert's `(kept,)` int64; set before each backward pass."""
        self.skips = False
        """Whether backward is to compute the chosen rows alone."""
        self._name, self._observe, self._mask_bias = name, observe, mask_bias
        self._module: Any = module  # its attributes are the experts interface's
        self._signature = inspect.signature(type(module).forward)
        module.forward = self._forward
        self._entering = None if enter is None else _on_entry(module, enter)

    def remove(self) -> None:
        """Give the module its own forward back."""
        self._module.__dict__.pop("forward", None)
        if self._entering is not None:
            self._entering.remove()

    @torch.compiler.disable(recursive=True, reason="how many tokens an expert gets is known in the forward pass only")
    def _forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        module = self._module
        if not (self.active and module.training and torch.is_grad_enabled()):
            result: torch.Tensor = type(module).forward(module, *args, **kwargs)
            return result
        bound = list(self._signature.bind(module, *args, **kwargs).arguments.values())
        return self._compute(*bound[1:4])

    def _compute(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """As `grouped_mm_experts_forward` of transformers defines it.

        Args:
            hidden: `(..., in)`.
            index: `(tokens, k)`: the experts of every token.
            weights: `(tokens, k)`: what their outputs are multiplied by.
        """
        module, k = self._module, index.shape[-1]
        flat = hidden.reshape(-1, hidden.shape[-1])
        experts, order = torch.sort(index.reshape(-1), stable=True)
        per_expert = torch.bincount(experts, minlength=module.num_experts).tolist()
        if len(per_expert) > module.num_experts:
            raise ClDistError(f"{self._name}: a token was routed to an expert that is not there")
        token = order // k

        def project(projection: str, inputs: torch.Tensor) -> torch.Tensor:
            output = self._project(projection, inputs, per_expert)
            self._observe(projection, Routed(output.detach(), per_expert, token, experts, hidden.shape[:-1]))
            return output

        if module.has_gate:
            inner = module._apply_gate(project("gate_up_proj", flat[token]))
        else:
            inner = module.act_fn(project("up_proj", flat[token]))
        outer = project("down_proj", inner)
        if getattr(module, "has_post_expert_norm", False):
            outer = module.post_expert_norm(outer)
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
        """Each expert's rows for the backward pass under way; None: all of them."""
        if not self.skips:
            return None
        if self.rows is None:
            raise ClDistError(f"layer {self._name}: backward ran before the rows of this step were chosen")
        return self.rows[projection]

    @property
    def mask_bias(self) -> bool:
        """Whether the biases' gradients are masked along."""
        return self._mask_bias


def _on_entry(module: nn.Module, enter: Callable[[torch.Size], None]) -> RemovableHandle:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else next(iter(kwargs.values()))
        enter(hidden.shape[:-1])

    return module.register_forward_pre_hook(hook, with_kwargs=True)


class _GroupedLinear(torch.autograd.Function):
    """`Y_e = X_e W_e^T (+ b_e)` for each expert's run of sorted inputs; of dW_e the chosen rows."""

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
        # The parameter itself is saved: under ZeRO-3 a view would keep the gathered weight alive.
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
                continue
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
    """Write one expert's gradients into zeros: of the chosen rows, or (None) of all.

    Args:
        weight: `(rows, in)`, perhaps a transposed view; None: not asked for.
        bias: `(rows,)`; None: not asked for.
        inputs: `(tokens, in)`.
        grad_output: `(tokens, rows)`.
        rows: `(kept,)` int64.
        mask_bias: Write the bias's chosen rows alone, too.
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
