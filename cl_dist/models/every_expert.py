"""Experts that are modules of their own (Switch, NLLB-MoE), run on every rank in the same order, with tokens or not.

transformers calls those experts only to which a token was routed. Ranks see other tokens, so they would call other
modules: under ZeRO-3 each would gather another expert's weights, and from stage 1 on add up gradients of different
experts; jobs break off or hang. An expert without tokens gets an empty input here, and a gradient of zero.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import nn


def run_every_expert(model: nn.Module) -> None:
    """Let each mixture of such experts in `model` call all of them in every forward pass; results stay the same."""
    for module in model.modules():
        forward = _FORWARDS.get(type(module).__name__)
        if forward is not None:
            module.forward = MethodType(forward, module)


def module_experts(model: nn.Module) -> tuple[str, ...]:
    """Prefixes of the names of what lies in such mixtures."""
    return tuple(f"{name}." for name, module in model.named_modules() if type(module).__name__ in _FORWARDS)


def _switch_forward(
    module: Any, hidden_states: torch.Tensor, selected_experts: torch.Tensor, routing_weights: torch.Tensor
) -> torch.Tensor:
    """`selected_experts` is one-hot `(tokens, 1, experts)`."""
    return _mixture(module, hidden_states, selected_experts, routing_weights)


def _nllb_forward(
    module: Any, hidden_states: torch.Tensor, router_mask: torch.Tensor, router_probs: torch.Tensor
) -> torch.Tensor:
    """`router_mask` holds experts' numbers, `(tokens, choices)`."""
    chosen = nn.functional.one_hot(router_mask, num_classes=module.num_experts)
    return _mixture(module, hidden_states, chosen, router_probs)


_FORWARDS = {"SwitchTransformersExperts": _switch_forward, "NllbMoeExperts": _nllb_forward}
"""By the class's name: importing a family's file costs time."""


def _mixture(module: Any, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The sum of all experts' outputs, each times its weight, `(tokens, features)`.

    Args:
        module: Its children `expert_0`, `expert_1`, ... are the experts.
        hidden: `(tokens, features)`.
        chosen: `(tokens, choices, experts)`, not zero where a choice is that expert.
        weights: `(tokens, choices)`: what the outputs are multiplied by.
    """
    result = torch.zeros_like(hidden)
    for number in range(module.num_experts):
        choice, token = torch.where(chosen[..., number].t())
        output = module[f"expert_{number}"](hidden[token]) * weights[token, choice, None]
        result.index_add_(0, token, _thinned(module, output).to(hidden.dtype))
    return result


def _thinned(module: Any, output: torch.Tensor) -> torch.Tensor:
    """NLLB-MoE drops out in training, and makes up for it outside of training in place of inside."""
    rate = getattr(module, "moe_token_dropout", 0)
    if not rate:
        return output
    dropped: torch.Tensor = module.token_dropout(output) if module.training else output * (1 - rate)
    return dropped
