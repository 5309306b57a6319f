"""`ShardView` behaves alike under every layout; what it does not cover is refused."""

from __future__ import annotations

from typing import Any

Ranks = list[dict[str, Any]]


def test_moments_of_the_step(ranks: Ranks) -> None:
    """The callbacks come in order, and a skipped step has its own."""
    assert all(rank["calls"] == ["allowed", "before", "after", "allowed", "skipped"] for rank in ranks)


def test_steps_are_counted(ranks: Ranks) -> None:
    # DeepSpeed's stage 0 in bfloat16 steps once on zero gradients while it initialises.
    first = 1 if ranks[0]["layout"] == "stage 0 in bfloat16" else 0
    for rank in ranks:
        steps = [rank[at] for at in ("step before", "step set", "step after", "step after skip")]
        assert steps == [first, 4, 5, 5]


def test_a_skipped_step_changes_no_bit(ranks: Ranks) -> None:
    assert all(rank["skip moved"] == [] for rank in ranks)


def test_nan_is_found_by_a_rank_that_holds_it(ranks: Ranks) -> None:
    assert all(rank["non-finite"][0] is None for rank in ranks)
    assert {rank["non-finite"][1] for rank in ranks} - {None} == {"body.0.weight"}
    assert not all(rank["norm is finite"] for rank in ranks)


def test_sums_over_own_elements_become_sums_over_all(ranks: Ranks, bound: float) -> None:
    assert all(rank["sum error"] < bound for rank in ranks)


def test_editing_is_noted(ranks: Ranks) -> None:
    assert all(rank["edited"] == sorted(rank["names"]) for rank in ranks)


def test_a_reset_clears_moments_and_count(ranks: Ranks) -> None:
    assert all(rank["reset"] for rank in ranks)


def test_state_that_no_layout_covers_is_refused(every_layout: Ranks) -> None:
    for rank in every_layout:
        assert rank["refused"] == [
            "zero.deepspeed: round_robin_gradients is not supported (its shards are mapped wrongly)"
        ]


def test_offloaded_gradients_are_read_only_once_they_have_arrived(every_layout: Ranks) -> None:
    for rank in every_layout:
        assert rank["late copy"] == {"allowed": True, "before": True}
