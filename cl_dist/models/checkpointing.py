"""Activation checkpointing: the blocks' activations are recomputed in the backward pass instead of kept."""

from __future__ import annotations

from torch import nn

from cl_dist.errors import BadInput
from cl_dist.models.structure import base_model


def enable_activation_checkpointing(model: nn.Module) -> None:
    """Let every transformer block of `model` (with or without adapters) recompute its activations.

    The non-reentrant form is used: it needs no input with a gradient, so it also serves blocks that get frozen
    embeddings. Raises BadInput where the architecture does not support it.
    """
    base = base_model(model)
    if not base.supports_gradient_checkpointing:
        raise BadInput(f"train.activation_checkpointing: {type(base).__name__} does not support it; allowed is false")
    # Before transformers 5.23 the method and its argument had another name.
    if hasattr(base, "activation_checkpointing_enable"):
        base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    else:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
