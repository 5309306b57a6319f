"""A saved state goes back into any number of ranks and any ZeRO stage, with the methods' own tensors."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ranks import run_ranks

JOBS = "tests.state.snapshot_jobs"


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        pytest.param((2, 2), (1, 3), marks=pytest.mark.slow),
        pytest.param((2, 3), (2, 1), marks=pytest.mark.slow),
        ((1, 0), (2, 2)),
    ],
    ids=lambda pair: f"{pair[0]}-ranks-zero{pair[1]}",
)
def test_other_ranks_and_stages_read_the_same_state(
    tmp_path: Path, saved: tuple[int, int], loaded: tuple[int, int]
) -> None:
    folder = str(tmp_path / "state")
    before = run_ranks(f"{JOBS}:save", saved[0], {"folder": folder, "stage": saved[1]})[0]
    for after in run_ranks(f"{JOBS}:load", loaded[0], {"folder": folder, "stage": loaded[1]}):
        assert after["wrong"] == 0
        assert (after["here"], after["step"]) == (1, 1)
        for quantity, total in before.items():
            assert after[quantity] == pytest.approx(total, abs=1e-9), quantity
