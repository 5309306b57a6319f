from __future__ import annotations

import time

import pytest

from cl_dist.engine import stop
from cl_dist.engine.stop import Deadline, no_limit


def test_without_a_time_limit_the_end_is_never_near() -> None:
    assert not Deadline().is_near()
    assert not Deadline(no_limit).is_near()


def test_before_any_measurement_a_share_of_the_time_is_reserved() -> None:
    assert Deadline(lambda: 100.0).needed == 2 * 10 + stop.MARGIN_SECONDS
    assert Deadline(lambda: 1e6).needed == 2 * stop.UNMEASURED_SECONDS + stop.MARGIN_SECONDS


def test_the_slowest_save_and_step_count() -> None:
    end, took = Deadline(lambda: 100.0), []
    for seconds in (0.0, 0.2, 0.1):
        began = time.monotonic()
        with end.saving():
            time.sleep(seconds)
        took.append(time.monotonic() - began)
    assert 2 * 0.2 <= end.needed - stop.MARGIN_SECONDS <= 2 * max(took)
    end.stepped(7.0)
    assert 2 * 0.2 + 7 <= end.needed - stop.MARGIN_SECONDS <= 2 * max(took) + 7


def test_the_end_is_near_when_a_step_and_a_save_no_longer_fit() -> None:
    left = 100.0
    end = Deadline(lambda: left)
    with end.saving():
        pass
    end.stepped(3.0)
    assert not end.is_near()
    left = 13.5
    assert not end.is_near()
    left = 12.9
    assert end.is_near()


def test_a_failed_save_is_not_measured() -> None:
    end = Deadline(lambda: 100.0)
    before = end.needed
    with pytest.raises(OSError, match="full"), end.saving():
        raise OSError("full")
    assert end.needed == before
