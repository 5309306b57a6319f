"""Runs all experts of a mixture on every rank in the same order, if they are separate modules (Switch, NLLB-MoE).

transformers calls only the experts that a token was routed to. Ranks see different tokens, so they would call different
modules: under ZeRO-3 each would gather the weights of another expert, and from stage 1 on they would add up gradients
of different experts, so jobs would crash or hang. Here an expert without tokens gets an empty input, and its gradient
is zero.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import nn


def run_every_expert(model: nn.Module) -> None:
    """Make every such mixture in `model` call all its experts in each forward pass. The results do not change."""
    for module in model.modules():
        forward = _FORWARDS.get(type(module).__name__)
        if forward is not None:
            module.forward = MethodType(forward, module)


def module_experts(model: nn.Module) -> tuple[str, ...]:
    """The name prefixes, each ending in a dot, of everything inside such mixtures."""
    return tuple(f"{name}." for name, module in model.named_modules() if type(module).__name__ in _FORWARDS)


def _switch_forward(
    module: Any, hidden_states: torch.Tensor, selected_experts: torch.Tensor, routing_weights: torch.Tensor
) -> torch.Tensor:
    """`selected_experts` is one-hot, `(tokens, 1, experts)`."""
    return _mixture(module, hidden_states, selected_experts, routing_weights)


def _nllb_forward(
    module: Any, hidden_states: torch.Tensor, router_mask: torch.Tensor, router_probs: torch.Tensor
) -> torch.Tensor:
    """`router_mask` holds expert numbers, `(tokens, choices)`."""
    chosen = nn.functional.one_hot(router_mask, num_classes=module.num_experts)
    return _mixture(module, hidden_states, chosen, router_probs)


_FORWARDS = {"SwitchTransformersExperts": _switch_forward, "NllbMoeExperts": _nllb_forward}
"""Keyed by class name, because importing a model family takes time."""


def _mixture(module: Any, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The weighted sum of the experts' outputs, `(tokens, features)`.

    Args:
        module: Its children `expert_0`, `expert_1`, ... are the experts.
        hidden: `(tokens, features)`.
        chosen: `(tokens, choices, experts)`, nonzero where a choice is that expert.
        weights: `(tokens, choices)`, the factors of the outputs.
    """
    result = torch.zeros_like(hidden)
    for number in range(module.num_experts):
        choice, token = torch.where(chosen[..., number].t())
        output = module[f"expert_{number}"](hidden[token]) * weights[token, choice, None]
        # NLLB-MoE applies dropout to the outputs in training, and scales them down otherwise.
        if rate := getattr(module, "moe_token_dropout", 0):
            output = module.token_dropout(output) if module.training else output * (1 - rate)
        result.index_add_(0, token, output.to(hidden.dtype))
    return result
