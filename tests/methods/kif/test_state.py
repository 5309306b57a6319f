"""KIF's state from the middle of a task loads into any number of ranks and any ZeRO stage, and training continues."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.ranks import run_ranks

JOBS = "tests.methods.kif.jobs"


@pytest.mark.parametrize(
    ("units", "saved", "loaded"),
    [("rank", (2, 2), (1, 3)), ("row", (2, 3), (2, 1)), ("matrix", (1, 0), (2, 2))],
    ids=str,
)
def test_other_ranks_and_stages_continue(
    tmp_path: Path, units: str, saved: tuple[int, int], loaded: tuple[int, int]
) -> None:
    folder = str(tmp_path / "state")
    before = run_ranks(f"{JOBS}:save", saved[0], {"folder": folder, "stage": saved[1], "units": units})[0]
    assert max(before["state"]["smoothed"]) > 0
    assert before["share"] != before["state"]["share_new"]
    for after in run_ranks(f"{JOBS}:load", loaded[0], {"folder": folder, "stage": loaded[1], "units": units}):
        assert after["state"] == before["state"]
        for quantity in ("share", "weights"):
            now, then = torch.tensor(after[quantity]), torch.tensor(before[quantity])
            assert torch.allclose(now, then, rtol=1e-6, atol=1e-6), quantity
