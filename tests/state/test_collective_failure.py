"""Work that fails on one rank fails on all of them."""

from __future__ import annotations

from tests.ranks import run_ranks


def test_a_failure_of_one_rank_is_one_of_all() -> None:
    first, second = run_ranks("tests.state.failure_job:main", 2)
    assert first["nothing"] == [0, None]
    assert second["nothing"] == [1, None]
    assert first["expected"] == second["expected"] == [None, "CheckpointDamaged: rank 1's file is damaged"]
    assert first["both"] == second["both"] == [None, "ClDistError: rank 0's disk is full"]
    assert first["by first"] == second["by first"] == [{"rank": 0}, None]
    assert first["first failed"] == second["first failed"] == [None, "BadInput: it is in use"]
    assert first["bug"] == [None, "ClDistError: rank 1 failed: KeyError: 'bug'"]
    assert second["bug"] == [None, "KeyError: 'bug'"]
