"""Layer shapes of published models, and which of them are measured. Loads no framework."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cl_dist.errors import BadInput

VOCABULARY = 1024
"""Small, since the output head is not tracked: Llama2-7B has 1,000 words for each of its layers, so that beside one
layer the head is as large a part of the step as it is there."""
WIDE = 2048
"""From this hidden size on published models have attention heads of 128 features, below of 64."""
SINGLE_LAYER_FROM = 4096
"""From this hidden size on one transformer layer is work enough for a measurement."""


@dataclass(frozen=True)
class Layer:
    """One linear layer."""

    outputs: int
    inputs: int


@dataclass(frozen=True)
class Model:
    """Widths of a model."""

    hidden: int
    intermediate: int
    heads: int
    key_value_heads: int
    blocks: int
    """Transformer blocks."""
    cross_attentions: int = 0
    """How many of the blocks have a second attention module."""
    gated: bool = True
    """Whether the MLP has a gate beside its first layer."""

    def attention_layers(self) -> list[Layer]:
        """Queries, keys, values and output of one attention module."""
        hidden, narrow = self.hidden, self.hidden // self.heads * self.key_value_heads
        return [Layer(hidden, hidden), Layer(narrow, hidden), Layer(narrow, hidden), Layer(hidden, hidden)]

    def block_layers(self) -> list[Layer]:
        """The linear layers of one block: attention's four, then the MLP's."""
        wide = [Layer(self.intermediate, self.hidden)] * (2 if self.gated else 1)
        return [*self.attention_layers(), *wide, Layer(self.hidden, self.intermediate)]

    def all_layers(self) -> list[Layer]:
        """The linear layers of all blocks."""
        return self.block_layers() * self.blocks + self.attention_layers() * self.cross_attentions


MODELS = {
    "smollm2-135m": Model(hidden=576, intermediate=1536, heads=9, key_value_heads=3, blocks=30),
    "llama2-7b": Model(hidden=4096, intermediate=11008, heads=32, key_value_heads=32, blocks=32),
    "t5-large": Model(1024, 2816, heads=16, key_value_heads=16, blocks=48, cross_attentions=24),
    "t5-large-original": Model(1024, 4096, 16, 16, blocks=48, cross_attentions=24, gated=False),
}
"""By name; `t5-large` is version 1.1, the original has a wider MLP without a gate."""
_INTERMEDIATE = {MODELS[name].hidden: MODELS[name].intermediate for name in ("smollm2-135m", "llama2-7b", "t5-large")}


def model_of(hidden: int, intermediate: int | None = None, blocks: int | None = None) -> Model:
    """The widths of a Llama of some hidden size, as published or in proportion. Raises BadInput."""
    widths = (128, 64, 16) if hidden >= WIDE else (64, 16)
    head = next((width for width in widths if hidden % width == 0), None)
    if head is None:
        raise BadInput(f"--hidden {hidden}: attention heads do not fit in; allowed is a multiple of 16")
    mlp = intermediate or _INTERMEDIATE.get(hidden, hidden * 11 // 4)
    return Model(hidden, mlp, hidden // head, hidden // head, blocks or default_blocks(hidden))


def default_blocks(hidden: int) -> int:
    """Transformer layers that are measured where none are asked for."""
    return 1 if hidden >= SINGLE_LAYER_FROM else 2


def layers_of(hidden: Sequence[int] | None, shapes: str | None) -> list[Layer]:
    """The layers that an operation is measured on: a model's, each shape once, or square ones."""
    if shapes is not None:
        return list(dict.fromkeys(MODELS[shapes].block_layers()))
    return [Layer(width, width) for width in hidden or ()]
