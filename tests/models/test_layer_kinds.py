"""A new kind of tracked layer takes one class and one entry; test_tracked_layers trains with it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from cl_dist.errors import BadInput
from cl_dist.kernels import RowLayout
from cl_dist.models import layer_kinds
from cl_dist.models.layer_kinds import takes_adapter
from cl_dist.models.skipping import RowSkipper
from cl_dist.models.tracked import row_layouts, tracked_layers, untracked_matrices
from tests.models.toy_kind import LowRank, LowRankKind


class Model(nn.Module):
    """One block with a layer of the toy kind and one of a built-in kind."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(LowRank(4, 6, rank=3), nn.Linear(6, 5))])


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> LowRankKind:
    """Register the toy kind."""
    kind = LowRankKind()
    monkeypatch.setattr(layer_kinds, "KINDS", [*layer_kinds.KINDS, kind])
    return kind


def test_a_new_kind_is_tracked(known: LowRankKind) -> None:
    model = Model()
    layers = tracked_layers(model, "blocks")
    assert list(layers) == ["layers.0.0", "layers.0.1"]
    layer = layers["layers.0.0"]
    assert (layer.kind, layer.weight, layer.bias) == (known, "layers.0.0.weight", None)
    assert layer.layout == RowLayout(1, 6, 3, columns=True)
    assert row_layouts(model) == {"layers.0.0.weight": layer.layout}
    assert untracked_matrices(model, layers) == {}


def test_without_its_entry_the_layer_is_untracked() -> None:
    model = Model()
    layers = tracked_layers(model, "blocks")
    assert list(layers) == ["layers.0.1"]
    assert untracked_matrices(model, layers) == {"layers.0.0.weight": "LowRank"}
    with pytest.raises(BadInput, match=r"the forward of layer l \(LowRank\)"):
        RowSkipper({"l": LowRank(4, 6, rank=3)})


def test_its_forward_skips_rows(known: LowRankKind) -> None:
    layer, x = LowRank(4, 6, rank=3), torch.randn(2, 5, 4)
    layer(x).square().sum().backward()
    assert layer.weight.grad is not None
    dense, expected = layer.weight.grad.clone(), torch.zeros(3, 6)
    expected[:, [1, 4]] = dense[:, [1, 4]]
    layer.weight.grad = None
    skipper = RowSkipper({"l": layer})
    skipper.active = True
    skipper.choose({"l": torch.tensor([1, 4])})
    layer(x).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, expected)


def test_which_layers_take_an_adapter() -> None:
    class Rounding(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input.round())

    inner = nn.MultiheadAttention(4, 2).out_proj
    found = [takes_adapter(module) for module in (nn.Linear(2, 2), Conv1D(2, 2), Rounding(2, 2), inner, nn.ReLU())]
    assert found == [True, True, False, False, None]
