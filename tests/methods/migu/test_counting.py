"""Launches and waits of the host between forward and backward, as on a GPU; see `tests/kernels/counting.py`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from cl_dist.kernels import kept_rows
from cl_dist.methods.migu.config import MiguConfig
from cl_dist.methods.migu.magnitudes import MagnitudeSums
from cl_dist.methods.migu.method import Agreement, Migu
from cl_dist.models.layer_kinds import layers_of
from tests.kernels.conftest import triton_path  # noqa: F401  a fixture
from tests.kernels.counting import DEVICE, Counting, OnDevice

ROWS = 12


@pytest.fixture(params=[1, 2])
def ranks(request: pytest.FixtureRequest) -> Iterator[int]:
    """A process group of one process that sends nothing, like PyTorch's own tests."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=request.param)
    yield request.param
    torch.distributed.destroy_process_group()


def between_forward_and_backward(number: int, selection: str) -> tuple[Counting, Migu]:
    """Choose the rows of so many layers after a forward pass."""
    model = nn.ModuleDict({f"l{n}": nn.Linear(4, ROWS, device=DEVICE) for n in range(number)})
    layers = {name: layer for name, module in model.items() for layer in layers_of(name, module, dict(model.items()))}
    migu = Migu(MiguConfig(name="migu", selection=selection))
    migu._seed = migu._task = 0
    with Counting() as seen:
        migu._layers, migu._sums = layers, MagnitudeSums(model, layers)
        migu._agreement = Agreement(DEVICE)
        for name, layer in layers.items():
            migu._sums.record(layer, OnDevice(torch.randn(5, ROWS)))
            assert migu._sums.calls[name] == 1
        seen.launches.clear()
        seen.waits.clear()
        keep, masks = migu._choose_rows()
        migu._remember(keep)
        for mask in masks.values():
            assert len(mask[0].rows) == kept_rows(ROWS, 0.7)
    return seen, migu


@pytest.mark.usefixtures("triton_path")
@pytest.mark.parametrize("selection", ["magnitude", "random"])
def test_the_host_waits_once_and_launches_do_not_grow_with_layers(ranks: int, selection: str) -> None:
    few, _ = between_forward_and_backward(2, selection)
    many, migu = between_forward_and_backward(9, selection)
    assert len(many.waits) == 1
    assert many.launches == few.launches
    assert len(many.launches) <= (4 if ranks == 1 else 13)
    assert len(migu.keep) == 18
