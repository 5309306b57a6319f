"""Finds the matrices that feed-forward channels and attention heads couple: a unit is rows of one and columns of
another.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import nn

from cl_dist.config.words import listed
from cl_dist.errors import BadInput
from cl_dist.methods.selective.blocks import linear_weights
from cl_dist.models.structure import base_model, whole_shape
from cl_dist.models.tracked import any_block

Kind = Literal["heads", "channels"]
Names = Mapping[str, str]
"""Layers by role, below a common prefix."""
LAYERS: Mapping[Kind, tuple[Names, ...]] = {
    "channels": (
        {"up": "up_proj", "gate": "gate_proj", "down": "down_proj"},
        {"up": "wi_1", "gate": "wi_0", "down": "wo"},
        {"up": "wi", "down": "wo"},
        {"up": "fc1", "down": "fc2"},
        {"up": "up_proj", "down": "down_proj"},
        {"up": "c_fc", "down": "c_proj"},
        {"up": "dense_h_to_4h", "down": "dense_4h_to_h"},
        {"up": "intermediate.dense", "down": "output.dense"},
        {"up": "lin1", "down": "lin2"},
    ),
    "heads": (
        {"value": "v_proj", "output": "o_proj"},
        {"value": "v_proj", "output": "out_proj"},
        {"value": "v_proj", "output": "dense"},
        {"value": "v", "output": "o"},
        {"value": "attention.self.value", "output": "attention.output.dense"},
        {"value": "v_lin", "output": "out_lin"},
    ),
}
"""What the families call their layers: Llama and its kin, T5, OPT and BART, GPT-2, GPT-NeoX, BERT, DistilBERT. The last
role of each is the layer whose columns a unit has; a unit has rows of the others."""
HEAD_SIZE = ("head_dim", "key_value_proj_dim", "attention_head_size")
"""What attention modules call the number of a head's values."""
SHOWN = 8
"""Most names in a message."""


@dataclass(frozen=True)
class Coupled:
    """The matrices of one module that its units couple."""

    weights: Mapping[str, str]
    """Names of the weights, by role."""
    units: int
    """Channels, or heads of the value matrix."""
    widths: Mapping[str, int]
    """Rows (of `output` and `down`: columns) that a unit has in each matrix, side by side, by role."""


def coupled(model: nn.Module, kind: Kind) -> list[Coupled]:
    """The coupled matrices of every module in the blocks that has some, in model order.

    Raises:
        BadInput: No module has any, such as with fused query, key and value, or a matrix is not made of units.
    """
    inputs = linear_weights(model, "s2ft")
    found = [_sized(model, each, inputs, kind) for each in _named(inputs, kind)]
    if not found:
        roles = " and ".join({"heads": ("value", "output"), "channels": ("up", "down")}[kind])
        layers = listed(dict.fromkeys(any_block(name) for name in inputs), SHOWN)
        raise BadInput(
            f"method.{kind}: {type(base_model(model)).__name__} has no separate {roles} matrices, which couple {kind}; "
            f"its blocks have {layers}; allowed: 0"
        )
    return found


def _named(weights: Mapping[str, int], kind: Kind) -> Iterator[dict[str, str]]:
    for weight in weights:
        for names in LAYERS[kind]:
            *_, last = names.values()
            prefix = weight.removesuffix(f"{last}.weight")
            found = {role: f"{prefix}{layer}.weight" for role, layer in names.items()}
            if f".{weight}".endswith(f".{last}.weight") and all(each in weights for each in found.values()):
                yield found
                break


def _sized(model: nn.Module, weights: Mapping[str, str], inputs: Mapping[str, int], kind: Kind) -> Coupled:
    *writers, reader = weights
    rows = {role: whole_shape(model.get_parameter(weights[role])).numel() // inputs[weights[role]] for role in writers}
    columns = inputs[weights[reader]]
    size = 1
    if kind == "heads":
        module = model.get_submodule(weights["value"].removesuffix(".weight").rpartition(".")[0])
        size = next((getattr(module, name) for name in HEAD_SIZE if hasattr(module, name)), 0)
    units = rows[writers[0]] // size if size else 0
    if not units or any(number != units * size for number in rows.values()) or columns % units:
        raise BadInput(
            f"method.{kind}: {', '.join(weights.values())} are not made of the same {kind}; allowed for this model: 0"
        )
    return Coupled(weights, units, {**dict.fromkeys(writers, size), reader: columns // units})
