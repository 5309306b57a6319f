from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from cl_dist.time_left import Forecast, Work, duration


class Clock:
    """A clock that the test advances."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


NAMES = ("a", "b", "c", "d")
WORK = Work(
    steps=(20,) * 4,
    samples=dict.fromkeys(NAMES, 50),
    rows=tuple(NAMES[: index + 1] for index in range(4)),
    batch=8,
)
STEP, SAMPLE, REST = 2.0, 0.1, 5.0
"""Seconds of a step, of scoring a sample, and of saving a task."""


def truth(start: int = 0) -> float:
    """Seconds from the start of a task to the end of the run."""
    return sum(20 * STEP + 50 * (index + 1) * SAMPLE + REST for index in range(start, 4))


def train(
    forecast: Forecast, clock: Clock, index: int, first: int = 0, step: float = STEP
) -> list[tuple[float, float]]:
    """A task; returns the time of each report and the time left that was predicted."""
    seen: list[tuple[float, float]] = []

    def note() -> None:
        left = forecast.run_left()
        if left is not None:
            seen.append((clock.now, left))

    forecast.task_started(index, 20)
    for number in range(first + 1, 21):
        clock.now += step
        forecast.stepped(number)
        note()
    for place, name in enumerate(NAMES[: index + 1]):
        forecast.scoring(name, 50, 50 * (index - place))
        for done in (10, 30, 50):
            clock.now += SAMPLE * (10 if done == 10 else 20)
            forecast.scored(done)
            note()
    clock.now += REST
    forecast.task_finished()
    note()
    return seen


def test_the_forecast_of_a_run_is_right_once_a_task_is_done_and_never_jumps() -> None:
    clock = Clock()
    forecast = Forecast(WORK, clock)
    seen = [report for index in range(4) for report in train(forecast, clock, index)]
    assert clock.now == pytest.approx(truth())
    # From the second step on there is a forecast. It knows neither what scoring nor what saving takes.
    assert seen[0][0] == 2 * STEP
    assert seen[0][1] == pytest.approx(truth() - 2 * STEP, rel=0.5)
    after_first = [left for now, left in seen if now >= 20 * STEP + 50 * SAMPLE + REST]
    expected = [truth() - now for now, left in seen if now >= 20 * STEP + 50 * SAMPLE + REST]
    assert after_first == pytest.approx(expected, abs=1e-6)
    # Where scoring is measured for the first time, a guess is replaced; nothing else moves the end of the run much.
    ends = [now + left for now, left in seen]
    jumps = [abs(later - earlier) / truth() for earlier, later in pairwise(ends)]
    assert max(jumps) < 0.4
    assert sorted(jumps)[-2] < 0.1
    assert seen[-1][1] == 0.0


def test_a_slow_step_moves_the_forecast_only_a_little() -> None:
    clock = Clock()
    forecast = Forecast(replace(WORK, steps=(1000, 1000), rows=(("a",), ("a", "b"))), clock)
    forecast.task_started(0, 1000)
    for number in range(1, 501):
        clock.now += STEP
        forecast.stepped(number)
    before = forecast.run_left()
    clock.now += 30 * STEP
    forecast.stepped(501)
    after = forecast.run_left()
    assert before is not None
    assert after is not None
    assert abs(after - before) < 0.07 * before


@pytest.mark.parametrize("completed", [1, 2, 3])
def test_a_resumed_run_knows_what_earlier_starts_measured(completed: int) -> None:
    clock = Clock()
    timings = [
        {"train_seconds": 20 * STEP, "steps": 20, "evaluate_seconds": 50 * (index + 1) * SAMPLE}
        for index in range(completed)
    ]
    forecast = Forecast(replace(WORK, timings=timings), clock)
    forecast.task_started(completed, 20)
    # It resumes after 10 of 20 steps. Only what saving takes is not recorded.
    forecast.stepped(11)
    assert forecast.run_left() == pytest.approx(truth(completed) - 11 * STEP - REST * (4 - completed))
    assert forecast.task_left() == pytest.approx(9 * STEP)


def test_a_task_on_other_ranks_than_before_soon_counts_by_itself() -> None:
    clock = Clock()
    timings = [{"train_seconds": 20 * STEP, "steps": 20, "evaluate_seconds": 5.0}]
    forecast = Forecast(replace(WORK, timings=timings), clock)
    forecast.task_started(1, 200)
    left = []
    for number in range(1, 102):
        clock.now += STEP / 2
        forecast.stepped(number)
        left.append(forecast.task_left())
    assert left[0] == pytest.approx(199 * STEP)
    assert left[-1] == pytest.approx(99 * STEP / 2, rel=0.05)


def test_tasks_without_steps_take_no_time() -> None:
    clock = Clock()
    forecast = Forecast(replace(WORK, steps=(20, 0, 0, 0), rows=(NAMES,) * 4), clock)
    forecast.task_started(0, 20)
    for number in range(1, 21):
        clock.now += STEP
        forecast.stepped(number)
    assert forecast.run_left() == pytest.approx(200 * STEP / 8)
    for place, name in enumerate(NAMES):
        forecast.scoring(name, 50, 50 * (3 - place))
        clock.now += 50 * SAMPLE
        forecast.scored(50)
    forecast.task_finished()
    forecast.task_started(1, 0)
    forecast.task_finished()
    assert forecast.run_left() == 0.0


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0 s"),
        (119.4, "119 s"),
        (120, "2 min"),
        (7000, "117 min"),
        (12000, "3 h 20 min"),
        (3600 * 47, "47 h 0 min"),
        (187200, "2 d 4 h"),
    ],
)
def test_durations_are_as_precise_as_an_estimate(seconds: float, words: str) -> None:
    assert duration(seconds) == words
