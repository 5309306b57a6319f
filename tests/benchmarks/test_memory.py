from __future__ import annotations

import sys

import pytest
import torch

from cl_dist.benchmarks.memory import growth, peak

MIB = 2**20
CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="read from /proc")


@pytest.mark.parametrize("megabytes", [64, 256])
def test_freed_memory_counts_towards_the_peak(megabytes: int) -> None:
    # The interpreter and the C library keep some of their own besides; 16 MiB is generous.
    grown = growth(lambda: torch.ones(megabytes * MIB // 4).sum(), CPU)
    assert grown is not None
    assert abs(grown - megabytes * MIB) < 16 * MIB


def test_an_earlier_peak_does_not_count() -> None:
    assert torch.ones(64 * MIB).sum() > 0
    found = peak(lambda: None, CPU)
    assert found is not None
    assert found.highest - found.before < 16 * MIB
