"""The weights inside the transformer blocks of which rows or columns can be trained alone."""

from __future__ import annotations

from torch import nn
from transformers.pytorch_utils import Conv1D

from cl_dist.config.words import listed
from cl_dist.errors import BadInput
from cl_dist.models.structure import whole_shape
from cl_dist.models.tracked import any_block, block_parameters, matrices_in_blocks

SHOWN = 6
"""Most names in a message."""


def names_in_blocks(model: nn.Module) -> frozenset[str]:
    """Names of the trainable parameters in the blocks."""
    return frozenset(block_parameters(model))


def linear_weights(model: nn.Module, method: str) -> dict[str, int]:
    """The trainable weights of the linear layers in the blocks, by name, with their numbers of inputs.

    Embedding tables are left out.

    Raises:
        BadInput: There are none, or the blocks have other trainable matrices, such as a mixture's experts.
    """
    found, others = {}, {}
    for name, module in matrices_in_blocks(model).items():
        weight = model.get_parameter(name)
        if isinstance(module, nn.Linear | Conv1D) and name.endswith(".weight"):
            found[name] = whole_shape(weight)[int(not isinstance(module, Conv1D))]
        elif not isinstance(module, nn.Embedding):
            others[any_block(name)] = type(module).__name__
    if others:
        names = listed((f"{name} of {kind}" for name, kind in others.items()), SHOWN)
        raise BadInput(f"method: {method} cannot train a part of {names}; allowed are models with linear layers only")
    if not found:
        raise BadInput(f"method: {method} needs linear layers inside transformer blocks, and the model has none")
    return found
