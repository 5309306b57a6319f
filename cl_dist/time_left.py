"""How long a task and the whole run will still take, from the times measured so far.

What is ahead is counted in optimiser steps and in samples to score; what they take is measured in this process and, of
tasks that an earlier start has completed, read from the manifest. All times are wall-clock times, so saving inside a
task counts as part of its steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

TRUSTED_STEPS = 5
"""A task's own steps outweigh those of the tasks before it once there are more of them than this."""


@dataclass(frozen=True)
class Work:
    """What a run consists of, as far as it is known before it starts."""

    steps: tuple[int, ...]
    """Optimiser steps of each task."""
    samples: Mapping[str, int]
    """Samples to score, by task."""
    rows: tuple[tuple[str, ...], ...]
    """The tasks to score after each task."""
    batch: int = 1
    """Samples of an optimiser step."""
    timings: Sequence[Mapping[str, Any]] = ()
    """Of the tasks that earlier starts have completed, as in the manifest."""


@dataclass
class _Pace:
    """Seconds for an amount of work."""

    seconds: float = 0.0
    amount: float = 0.0

    def add(self, seconds: float, amount: float) -> None:
        self.seconds += seconds
        self.amount += amount

    @property
    def each(self) -> float | None:
        """Seconds for one; None if nothing is measured."""
        return self.seconds / self.amount if self.amount else None


@dataclass
class Forecast:
    """Predicts from what it is told; `clock` returns the current time in seconds."""

    work: Work
    clock: Callable[[], float] = time.monotonic
    index: int = 0
    """The current task."""
    _steps: _Pace = field(default_factory=_Pace)
    """Of all tasks before the current one."""
    _own: _Pace = field(default_factory=_Pace)
    """Of the current task in this process, without its first step, which also builds what the others reuse."""
    _scoring: dict[str, _Pace] = field(default_factory=dict)
    """By task or, for small tasks that are scored together, by group."""
    _scored_before: _Pace = field(default_factory=_Pace)
    """Scoring by earlier starts, the export of the model included."""
    _rest: _Pace = field(default_factory=_Pace)
    """Whatever else a task takes, such as tokenising and saving."""
    _first: tuple[int, float] | None = None
    _step: int = 0
    _total: int = 0
    """Steps of the current task."""
    _began: float | None = None
    _group: tuple[str, int, float, int] | None = None
    """What is being scored: its name, its samples, when it started, and the samples of the row that come later."""
    _group_done: int = 0
    _later: int | None = None
    """Samples of the row that come after what was scored last; None: the row has not begun."""
    _busy: float = 0.0
    """Seconds of the current task that went into steps and scoring."""

    def __post_init__(self) -> None:
        for entry, row in zip(self.work.timings, self.work.rows, strict=False):
            if entry.get("steps"):
                self._steps.add(entry.get("train_seconds", 0.0), entry["steps"])
                self._scored_before.add(entry.get("evaluate_seconds", 0.0), self._samples(row))

    def task_started(self, index: int, steps: int) -> None:
        """Task `index`, which has `steps` optimiser steps, starts or resumes."""
        self.scored()
        self.index, self._total, self._step, self._first = index, steps, 0, None
        self._own, self._began, self._busy, self._later = _Pace(), self.clock(), 0.0, None

    def stepped(self, step: int) -> None:
        """`step` steps of the task are done."""
        now = self.clock()
        self._first = self._first or (step, now)
        self._own = _Pace(now - self._first[1], step - self._first[0])
        self._step = step

    def scoring(self, name: str, samples: int, later: int) -> None:
        """Scoring of `samples` samples of a task, or of a group of small ones, starts; `later` of the row follow."""
        self.scored()
        self._group, self._group_done, self._later = (name, samples, self.clock(), later), 0, later

    def scored(self, done: int | None = None) -> None:
        """So many samples of what is being scored are done; None: all of them."""
        if self._group is None:
            return
        name, samples, began, _ = self._group
        if done is not None:
            self._group_done = done
            if done < samples:
                return
        self._group = None
        if samples:  # otherwise unknown: then it counts as the rest of the task
            seconds = self.clock() - began
            self._busy += seconds
            self._scoring.setdefault(name, _Pace()).add(seconds, samples)

    def task_finished(self) -> None:
        """The current task is trained, scored and saved."""
        self.scored()
        if self._began is not None and self._total:
            self._busy += self._own.seconds
            first = self._own.each or 0.0  # the step before the measured ones
            self._rest.add(max(0.0, self.clock() - self._began - self._busy - first), 1)
            self._steps.add(self._own.seconds, self._own.amount)
        self._own, self._began, self._first, self._later = _Pace(), None, None, None
        self.index, self._step, self._total = self.index + 1, 0, 0

    def task_left(self) -> float | None:
        """Seconds until the steps of the task are done; None if nothing is measured yet."""
        pace = self._pace()
        return None if pace is None else pace * max(0, self._total - self._step)

    def scoring_left(self) -> float | None:
        """Seconds until what is being scored is done; None if nothing is measured yet."""
        if self._group is None or not self._group_done:
            return None
        _, samples, began, _ = self._group
        return (self.clock() - began) / self._group_done * max(0, samples - self._group_done)

    def run_left(self) -> float | None:
        """Seconds until the run is finished; None if no steps are measured yet."""
        pace = self._pace()
        every = _Pace(self._steps.seconds + self._own.seconds, self._steps.amount + self._own.amount)
        if pace is None or every.each is None:
            return None
        rest = self._rest.each or 0.0
        left = pace * max(0, self._total - self._step) + rest if self._total else 0.0
        left += self._row_left(every.each)
        for index in range(self.index + 1 if self._began is not None else self.index, len(self.work.steps)):
            if self.work.steps[index]:
                scoring = sum(self.work.samples[name] * self._each(name, every.each) for name in self.work.rows[index])
                left += self.work.steps[index] * every.each + scoring + rest
        return left

    def _row_left(self, step: float) -> float:
        """Seconds to score what is left of the current row."""
        if self._group is not None:
            name, samples, _, later = self._group
            own = self.scoring_left()
            own = samples * self._each(name, step) if own is None else own
            return own + later * self._each("", step)
        if self._later is not None:
            return self._later * self._each("", step)
        if self._began is None or not self._total:
            return 0.0
        return sum(self.work.samples[name] * self._each(name, step) for name in self.work.rows[self.index])

    def _pace(self) -> float | None:
        """Seconds for a step of the current task."""
        if self._own.each is None or self._steps.each is None:
            return self._own.each if self._own.each is not None else self._steps.each
        weight = self._own.amount / (self._own.amount + TRUSTED_STEPS)
        return weight * self._own.each + (1 - weight) * self._steps.each

    def _each(self, name: str, step: float) -> float:
        """Seconds to score a sample of a task: as measured for it, or for others, or else as long as training on it."""
        own = self._scoring.get(name, _Pace()).each
        if own is not None:
            return own
        measured = [*self._scoring.values(), self._scored_before]
        if self._group is not None and self._group_done:
            measured.append(_Pace(self.clock() - self._group[2], self._group_done))
        every = _Pace(sum(pace.seconds for pace in measured), sum(pace.amount for pace in measured)).each
        return every if every is not None else step / self.work.batch

    def _samples(self, row: Sequence[str]) -> int:
        return sum(self.work.samples[name] for name in row)


def duration(seconds: float) -> str:
    """A time in words, as precise as an estimate deserves: `80 s`, `14 min`, `3 h 20 min`, `2 d 4 h`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60 // 10 * 10} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"
