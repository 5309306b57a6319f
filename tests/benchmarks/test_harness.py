from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable

import pytest

from cl_dist.benchmarks.harness import (
    MOST_REPEATS,
    SHORTEST,
    Contestant,
    Spread,
    Times,
    WallClock,
    race,
    rotated,
)


class FakeClock:
    """Each contestant has its own seconds, and the whole machine is twice as slow in every other round."""

    def __init__(self, seconds: dict[str, float], warm_up: int = 2) -> None:
        self.seconds_of = seconds
        self.warm_up = warm_up
        self.calls: list[tuple[str, int]] = []

    def seconds(self, contestant: Contestant, repeats: int) -> float:
        name = contestant.run()
        assert isinstance(name, str)
        self.calls.append((name, repeats))
        measured = len(self.calls) - self.warm_up * len(self.seconds_of)
        slow = measured > 0 and (measured - 1) // len(self.seconds_of) % 2 == 1
        return self.seconds_of[name] * (2 if slow else 1)


def contestants(*names: str) -> dict[str, Contestant]:
    return {name: Contestant(lambda name=name: name) for name in names}  # type: ignore[misc]


class TestRace:
    """Every round runs all contestants."""

    def test_every_round_runs_every_contestant_starting_with_another(self) -> None:
        clock = FakeClock({"a": 1.0, "b": 2.0, "c": 4.0})
        race(contestants("a", "b", "c"), 4, clock)
        names = [name for name, _ in clock.calls]
        assert names[:6] == ["a", "a", "b", "b", "c", "c"]
        assert ["".join(names[i : i + 3]) for i in range(6, 18, 3)] == ["abc", "bca", "cab", "abc"]

    def test_ratios_are_within_a_round(self) -> None:
        times = race(contestants("a", "b"), 4, FakeClock({"a": 1.0, "b": 4.0}))
        assert times.seconds == {"a": [1, 2, 1, 2], "b": [4, 8, 4, 8]}
        assert times.ratio("a", "b") == Spread(0.25, 0.25, 0.25)
        assert times.ratio("b", "a") == Spread(4, 4, 4)
        assert times.spread("b") == Spread(6, 4, 8)

    def test_a_fast_contestant_runs_several_times_per_measurement(self) -> None:
        clock = FakeClock({"slow": 2 * SHORTEST, "quick": SHORTEST / 4, "idle": 0.0})
        race(contestants("slow", "quick", "idle"), 1, clock)
        assert dict(clock.calls[6:]) == {"slow": 1, "quick": 4, "idle": MOST_REPEATS}


def test_medians_of_ratios_are_not_ratios_of_medians() -> None:
    times = Times({"a": [1.0, 9.0, 2.0], "b": [1.0, 3.0, 4.0]})
    assert times.ratio("a", "b") == Spread(median=1.0, minimum=0.5, maximum=3.0)
    assert Spread.of([1.0, 2.0]).as_dict() == {"median": 1.5, "minimum": 1.0, "maximum": 2.0}


def test_different_numbers_of_rounds_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="zip"):
        Times({"a": [1.0], "b": [1.0, 2.0]}).ratio("a", "b")


@pytest.mark.parametrize(("number", "order"), [(0, "abc"), (1, "bca"), (5, "cab")])
def test_the_order_rotates(number: int, order: str) -> None:
    assert "".join(rotated("abc", number)) == order


@pytest.fixture
def advance(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """A clock that only the test moves."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def advance(seconds: float) -> None:
        now[0] += seconds

    return advance


def test_preparing_and_finishing_are_not_measured(advance: Callable[[float], None]) -> None:
    calls: Counter[str] = Counter()

    def slow(name: str) -> None:
        calls[name] += 1
        advance(5.0)

    contestant = Contestant(lambda: advance(0.5), prepare=lambda: slow("prepare"), finish=lambda: slow("finish"))
    assert WallClock().seconds(contestant, 2) == pytest.approx(0.5)
    assert calls == {"prepare": 2, "finish": 2}


def test_the_mean_of_several_runs_is_measured(advance: Callable[[float], None]) -> None:
    durations = iter([1.0, 2.0, 6.0])
    assert WallClock().seconds(Contestant(lambda: advance(next(durations))), 3) == pytest.approx(3.0)
