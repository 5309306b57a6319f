"""Layer shapes of published models, and the shapes to measure. Imports no framework."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cl_dist.errors import BadInput

VOCABULARY = 1024
"""Small, because the output head is not tracked: Llama2-7B has 1,000 words per layer, so next to a single layer this
head is as large a part of the step as it is there."""
WIDE = 2048
"""Published models have attention heads of 128 features from this hidden size on, and of 64 below."""
SINGLE_LAYER_FROM = 4096
"""From this hidden size on, a single transformer layer is enough work for a measurement."""


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
    """Number of blocks with a second attention module."""
    gated: bool = True
    """Whether the MLP has a gate parallel to its first layer."""

    def attention_layers(self) -> list[Layer]:
        """The layers of one attention module: queries, keys, values, output."""
        hidden, narrow = self.hidden, self.hidden // self.heads * self.key_value_heads
        return [Layer(hidden, hidden), Layer(narrow, hidden), Layer(narrow, hidden), Layer(hidden, hidden)]

    def block_layers(self) -> list[Layer]:
        """The linear layers of one block: those of attention, then those of the MLP."""
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
"""Models by name; `t5-large` is version 1.1, while the original has a wider MLP without a gate."""
_INTERMEDIATE = {MODELS[name].hidden: MODELS[name].intermediate for name in ("smollm2-135m", "llama2-7b", "t5-large")}


def model_of(hidden: int, intermediate: int | None = None, blocks: int | None = None) -> Model:
    """The widths of a Llama with this hidden size: the published ones, or scaled in proportion. Raises BadInput."""
    widths = (128, 64, 16) if hidden >= WIDE else (64, 16)
    head = next((width for width in widths if hidden % width == 0), None)
    if head is None:
        raise BadInput(f"--hidden {hidden}: cannot be divided into attention heads; give a multiple of 16")
    mlp = intermediate or _INTERMEDIATE.get(hidden, hidden * 11 // 4)
    return Model(hidden, mlp, hidden // head, hidden // head, blocks or default_blocks(hidden))


def default_blocks(hidden: int) -> int:
    """The default number of transformer layers."""
    return 1 if hidden >= SINGLE_LAYER_FROM else 2


def layers_of(hidden: Sequence[int] | None, shapes: str | None) -> list[Layer]:
    """The layers to measure an operation on: each distinct shape of a model, or square layers."""
    if shapes is not None:
        return list(dict.fromkeys(MODELS[shapes].block_layers()))
    return [Layer(width, width) for width in hidden or ()]
