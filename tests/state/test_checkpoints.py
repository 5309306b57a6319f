"""When a checkpoint is due; tests/faults/test_damaged_checkpoints.py has the rest of the module."""

from __future__ import annotations

from cl_dist.config.schema import CheckpointConfig
from cl_dist.state.checkpoints import CheckpointSchedule


class Clock:
    """A clock that the test sets."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def schedule(**settings: float | None) -> tuple[CheckpointSchedule, Clock]:
    clock = Clock()
    return CheckpointSchedule(CheckpointConfig(**settings), clock), clock  # type: ignore[arg-type]


def test_steps() -> None:
    plan, clock = schedule(every_steps=3)
    clock.now += 1e6
    assert not plan.minutes_over()
    assert [step for step in range(1, 8) if plan.due(step, minutes_over=False)] == [3, 6]


def test_minutes_count_from_the_last_save() -> None:
    plan, clock = schedule(every_steps=None, every_minutes=2.0)
    clock.now += 119
    assert not plan.minutes_over()
    clock.now += 1
    assert plan.minutes_over()
    plan.restart()
    assert not plan.minutes_over()
    clock.now += 120
    assert plan.minutes_over()


def test_whichever_comes_first() -> None:
    plan, _ = schedule(every_steps=3, every_minutes=2.0)
    assert plan.due(3, minutes_over=False)
    assert plan.due(4, minutes_over=True)
    assert not plan.due(4, minutes_over=False)


def test_neither() -> None:
    plan, clock = schedule(every_steps=None)
    clock.now += 1e9
    assert not plan.due(200, plan.minutes_over())
