"""How much memory a rank may still allocate, on a machine without a GPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from cl_dist.engine import distributed
from cl_dist.engine.distributed import free_memory

ON_CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="asks the GPU where there is one")


@ON_CPU
def test_ranks_of_a_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    alone = free_memory()
    physical = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    assert 0 < alone <= physical
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_memory() == pytest.approx(alone / 4, rel=0.5)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"memory.max": "1000\n", "memory.current": "300\n"}, 700),
        ({"memory.max": "1000\n", "memory.current": "1300\n"}, 0),
        ({"memory.max": "max\n", "memory.current": "300\n"}, sys.maxsize),
        ({}, sys.maxsize),
    ],
)
def test_a_container_may_have_less(tmp_path: Path, files: dict[str, str], expected: int) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    assert distributed._left_in_container(tmp_path) == expected
