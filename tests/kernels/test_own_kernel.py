"""The kernel that docs/extending.md shows, run from the page: a file outside the package."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.kernels.conftest import kernels_device

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    section = PAGE.read_text(encoding="utf-8").partition("## A kernel")[2]
    path = tmp_path_factory.mktemp("kernel") / "row_norm.py"
    path.write_text(re.findall(r"```python\n(.*?)```", section, re.DOTALL)[0])
    spec = importlib.util.spec_from_file_location("row_norm", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", ["cpu", "triton", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 5), (2, 1024), (4, 2500), (0, 7)])
def test_it_equals_its_plain_version(
    kernel: ModuleType, monkeypatch: pytest.MonkeyPatch, path: str, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    device = kernels_device() if path == "triton" else torch.device("cpu")
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    monkeypatch.setattr(kernel, "path_of", lambda _: path)
    expected = matrix.double().square().sum(dim=1).sqrt().float()
    torch.testing.assert_close(kernel.row_norm(matrix), expected, rtol=1e-5, atol=0.0)
