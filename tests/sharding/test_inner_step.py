"""Frozen rows keep every bit through AdamW's step, and the gradients shown behind it are the clipped ones."""

from __future__ import annotations

from typing import Any

Ranks = list[dict[str, Any]]


def test_frozen_rows_of_weight_and_moments_keep_every_bit(ranks: Ranks) -> None:
    assert all(rank["frozen moved"] == 0 for rank in ranks)


def test_the_other_rows_move(ranks: Ranks) -> None:
    assert all(rank["kept still"] == 0 for rank in ranks)


def test_every_bit_is_that_of_torchs_step_with_the_rows_put_back(ranks: Ranks) -> None:
    """Torch's fused AdamW is replaced by one that steps kept rows alone; another AdamW rounds in its own way."""
    if "another AdamW" not in ranks[0]["layout"]:
        assert all(rank["frozen bits"] == 0 for rank in ranks)


def test_gradients_behind_the_step_are_the_clipped_ones(ranks: Ranks, bound: float) -> None:
    """Though they were doubled before clipping: it divides by the norm after the edit."""
    for rank in ranks:
        assert rank["taken"] == sorted(rank["spans"])
        assert rank["taken error"] < bound


def test_masters_are_updated_by_then(ranks: Ranks) -> None:
    assert all(rank["taken after the update"] for rank in ranks)
