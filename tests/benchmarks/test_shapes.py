from __future__ import annotations

import pytest

from cl_dist.benchmarks.shapes import MODELS, Layer, layers_of, model_of
from cl_dist.errors import BadInput


@pytest.mark.parametrize(
    ("name", "layers", "parameters"),
    # Parameters of the blocks' linear layers, counted by hand from the published configurations.
    [
        ("smollm2-135m", 210, 30 * (2 * 576 * 576 + 2 * 192 * 576 + 3 * 576 * 1536)),
        ("llama2-7b", 224, 32 * (4 * 4096**2 + 3 * 4096 * 11008)),
        ("t5-large", 48 * 4 + 24 * 4 + 48 * 3, 72 * 4 * 1024**2 + 48 * 3 * 1024 * 2816),
        ("t5-large-original", 48 * 4 + 24 * 4 + 48 * 2, 72 * 4 * 1024**2 + 48 * 2 * 1024 * 4096),
    ],
)
def test_published_models(name: str, layers: int, parameters: int) -> None:
    shapes = MODELS[name].all_layers()
    assert len(shapes) == layers
    assert sum(layer.outputs * layer.inputs for layer in shapes) == parameters


def test_layers_are_a_models_distinct_shapes_or_square() -> None:
    assert layers_of(None, "llama2-7b") == [Layer(4096, 4096), Layer(11008, 4096), Layer(4096, 11008)]
    assert layers_of((8, 16), None) == [Layer(8, 8), Layer(16, 16)]


@pytest.mark.parametrize(
    ("hidden", "intermediate", "heads", "blocks"),
    [(1024, 2816, 16, 2), (4096, 11008, 32, 1), (576, 1536, 9, 2), (64, 176, 1, 2), (48, 132, 3, 2)],
)
def test_a_llama_with_a_given_hidden_size(hidden: int, intermediate: int, heads: int, blocks: int) -> None:
    model = model_of(hidden)
    assert (model.intermediate, model.heads, model.key_value_heads, model.blocks) == (
        intermediate,
        heads,
        heads,
        blocks,
    )


def test_heads_have_to_fit() -> None:
    with pytest.raises(BadInput, match=r"--hidden 50: .* give a multiple of 16"):
        model_of(50)
