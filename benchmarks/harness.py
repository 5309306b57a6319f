"""Measures contestants side by side, in alternating rounds, and compares the times of the same round.

A shared machine may be fast in one minute and slow in the next. Therefore every round runs every contestant, starting
with another one each time, and the result is the median over all rounds of the ratio within a round.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

import torch

SHORTEST = 0.02
"""Minimum length of a measurement in seconds; a faster contestant runs several times."""
MOST_REPEATS = 2000
CACHE_BYTES = 256 << 20
"""Written between two runs on a GPU to flush its cache; more than any cache holds."""


def nothing() -> None:
    """Default preparation of a contestant."""


@dataclass(frozen=True)
class Contestant:
    """One implementation of the measured operation."""

    run: Callable[[], object]
    prepare: Callable[[], object] = nothing
    """Called before each run; not measured."""
    finish: Callable[[], object] = nothing
    """Called after each run; not measured."""


class Clock(Protocol):
    """Measures the time of a contestant."""

    def seconds(self, contestant: Contestant, repeats: int) -> float:
        """Mean time of one of `repeats` runs."""


class WallClock:
    """For work that is complete when the call returns."""

    def seconds(self, contestant: Contestant, repeats: int) -> float:
        """Mean time of one of `repeats` runs."""
        return math.fsum(self._once(contestant) for _ in range(repeats)) / repeats

    def _once(self, contestant: Contestant) -> float:
        contestant.prepare()
        start = time.perf_counter()
        contestant.run()
        elapsed = time.perf_counter() - start
        contestant.finish()
        return elapsed


class GpuClock:
    """Times events in the GPU's queue; flushes the cache before every run, like `triton.testing.do_bench`.

    Args:
        device: The GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._cache = torch.empty(CACHE_BYTES, dtype=torch.int8, device=device)

    def seconds(self, contestant: Contestant, repeats: int) -> float:
        """Mean time of one of `repeats` runs."""
        return math.fsum(self._once(contestant) for _ in range(repeats)) / repeats

    def _once(self, contestant: Contestant) -> float:
        contestant.prepare()
        # Events measure on the GPU itself: the queue runs behind the Python code.
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._cache.zero_()
        start.record()
        contestant.run()
        stop.record()
        torch.cuda.synchronize()
        contestant.finish()
        return start.elapsed_time(stop) / 1e3


def clock_for(device: torch.device) -> Clock:
    """The clock for a device."""
    return GpuClock(device) if device.type == "cuda" else WallClock()


@dataclass(frozen=True)
class Spread:
    """Statistics over several rounds."""

    median: float
    minimum: float
    maximum: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Statistics of at least one value."""
        return cls(statistics.median(values), min(values), max(values))

    def as_dict(self) -> dict[str, float]:
        """The JSON object."""
        return asdict(self)


@dataclass(frozen=True)
class Times:
    """Seconds per run of every contestant, one entry per round."""

    seconds: Mapping[str, Sequence[float]]

    def spread(self, name: str) -> Spread:
        """One contestant's seconds."""
        return Spread.of(self.seconds[name])

    def ratio(self, above: str, below: str) -> Spread:
        """The time of one contestant divided by another's in the same round."""
        pairs = zip(self.seconds[above], self.seconds[below], strict=True)
        return Spread.of([one / other for one, other in pairs])


def race(contestants: Mapping[str, Contestant], runs: int, clock: Clock) -> Times:
    """Warm up every contestant, then measure all of them in each of `runs` rounds."""
    repeats = {name: _repeats(contestant, clock) for name, contestant in contestants.items()}
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(runs):
        for name in rotated(list(contestants), number):
            seconds[name].append(clock.seconds(contestants[name], repeats[name]))
    return Times(seconds)


def rotated(names: Sequence[str], number: int) -> list[str]:
    """The contestants' order in round `number`: each of them gets its turn to be first."""
    first = number % len(names)
    return [*names[first:], *names[:first]]


def _repeats(contestant: Contestant, clock: Clock) -> int:
    """The number of runs in one measurement."""
    clock.seconds(contestant, 1)  # the first run may compile something
    once = clock.seconds(contestant, 1)
    return min(MOST_REPEATS, max(1, math.ceil(SHORTEST / max(once, 1e-9))))
