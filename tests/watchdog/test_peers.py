from __future__ import annotations

import pytest

from cl_dist.watchdog.peers import Limits, Pulse, Sighting, describe

LIMITS = Limits(hang=10.0, silence=3.0)


def seen(age: float, waiting: bool = False, silent: float = 0.0, phase: str = "training task a, step 3") -> Sighting:
    return Sighting(Pulse(7, age, phase, waiting), silent)


@pytest.mark.parametrize(
    ("sighting", "stuck"),
    [
        (seen(11.0), True),
        (seen(9.0), False),
        (seen(0.1, silent=4.0), True),
        (Sighting(None, 4.0), True),
        (Sighting(None, 0.0), False),  # not read yet
    ],
)
def test_which_rank_makes_no_progress(sighting: Sighting, stuck: bool) -> None:
    assert LIMITS.is_stuck(sighting) == stuck


def test_a_silent_rank_is_named_before_one_that_is_stuck() -> None:
    text = describe({0: seen(30.0), 1: seen(0.2, silent=8.0)}, LIMITS)
    assert text.startswith("rank 1 gives no sign of life, last seen while training task a, step 3")


def test_a_rank_that_left_no_pulse_is_named() -> None:
    assert describe({0: seen(11.0), 1: Sighting(None, 8.0)}, LIMITS).startswith("rank 1 gives no sign of life (")


def test_many_silent_ranks_are_counted() -> None:
    text = describe({0: seen(11.0), **{rank: seen(0.1, silent=5.0) for rank in range(1, 13)}}, LIMITS)
    assert text.startswith("ranks 1, 2, 3, 4, 5, 6, 7, 8 and 4 more give no sign of life")


def test_a_rank_outside_of_collectives_is_named_before_an_older_one_that_waits() -> None:
    text = describe({0: seen(12.0, waiting=True), 1: seen(11.0)}, LIMITS)
    assert text.startswith("rank 1 has made no progress for 11 s while training task a, step 3")


def test_of_several_ranks_outside_of_collectives_the_oldest_is_named() -> None:
    assert describe({0: seen(12.0), 1: seen(13.0), 2: seen(11.0)}, LIMITS).startswith("rank 1 ")


def test_if_all_ranks_wait_no_single_rank_is_blamed() -> None:
    text = describe({0: seen(12.0, waiting=True), 1: seen(14.0, waiting=True)}, LIMITS)
    assert text.startswith("all ranks wait for each other in a collective operation, rank 1 the longest")


def test_a_single_rank_is_stuck_by_itself() -> None:
    assert describe({0: seen(12.4)}, LIMITS) == "stuck while training task a, step 3"
