"""Each operation is tested on its CPU path and on its Triton kernels, interpreted without a GPU."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from cl_dist.kernels import backend

if backend.triton is not None and backend.release(backend.triton) < (3, 7):
    # The interpreter of Triton 3.6 converts a loop's bound, an array of one element, with int(), which NumPy 2.4
    # refuses. Triton 3.7 takes the element out first. Compiled kernels are not affected.
    from triton.runtime import interpreter

    _patch = interpreter._patch_lang_tensor

    def _with_scalar_index(tensor: type, scope: Any) -> None:
        _patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = _with_scalar_index


def kernels_device() -> torch.device:
    """Where Triton kernels run in these tests: on a GPU, or interpreted on the CPU (see tests/conftest.py)."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def triton_path(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Send every operation to its Triton kernels, and return the device for their tensors."""
    if backend.triton is None:
        pytest.skip("Triton is not installed")
    for name, module in list(sys.modules.items()):
        if name.startswith("cl_dist.kernels.") and hasattr(module, "path_of"):
            monkeypatch.setattr(module, "path_of", lambda _: "triton")
    return kernels_device()


@pytest.fixture(params=["cpu", "triton"])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Run the test once on the CPU path and once on the Triton kernels."""
    return torch.device("cpu") if request.param == "cpu" else request.getfixturevalue("triton_path")


@pytest.fixture
def dirty_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not written shows."""
    new = torch.Tensor.new_empty

    def filled(*arguments: object, **settings: object) -> torch.Tensor:
        tensor = new(*arguments, **settings)
        return tensor.fill_(float("nan") if tensor.is_floating_point() else 2**20)

    monkeypatch.setattr(torch.Tensor, "new_empty", filled)
