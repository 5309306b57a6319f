"""Measuring contestants side by side: alternating rounds, and the ratios of what ran in the same round.

A shared machine is fast in one minute and slow in the next. So every round runs every contestant, the first one
changing from round to round, and what is quoted is the median over rounds of the ratio within a round.
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
"""Seconds that one measurement takes at least: a quicker contestant runs several times in it."""
MOST_REPEATS = 2000
CACHE_BYTES = 256 << 20
"""Written between two runs on a GPU, so that no run finds its operands in the cache; more than any cache holds."""


def nothing() -> None:
    """What a contestant prepares by default."""


@dataclass(frozen=True)
class Contestant:
    """One way to do what is measured."""

    run: Callable[[], object]
    prepare: Callable[[], object] = nothing
    """Before each run, outside of the clock."""
    finish: Callable[[], object] = nothing
    """After each run, outside of the clock."""


class Clock(Protocol):
    """Something that measures."""

    def seconds(self, contestant: Contestant, repeats: int) -> float:
        """Mean time of one of `repeats` runs."""


class WallClock:
    """For work that is done when the call returns."""

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
    """Events on the GPU's own queue; the cache is flushed before every run, as `triton.testing.do_bench` does it.

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
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._cache.zero_()
        start.record()
        contestant.run()
        stop.record()
        torch.cuda.synchronize()
        contestant.finish()
        return start.elapsed_time(stop) / 1e3


def clock_for(device: torch.device) -> Clock:
    """The clock that fits a device."""
    return GpuClock(device) if device.type == "cuda" else WallClock()


@dataclass(frozen=True)
class Spread:
    """What several rounds gave."""

    median: float
    minimum: float
    maximum: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Over at least one value."""
        return cls(statistics.median(values), min(values), max(values))

    def as_dict(self) -> dict[str, float]:
        """As it stands in JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Times:
    """Seconds per run of every contestant, one entry a round."""

    seconds: Mapping[str, Sequence[float]]

    def spread(self, name: str) -> Spread:
        """One contestant's seconds."""
        return Spread.of(self.seconds[name])

    def ratio(self, above: str, below: str) -> Spread:
        """Time of one contestant over another's in the same round."""
        pairs = zip(self.seconds[above], self.seconds[below], strict=True)
        return Spread.of([one / other for one, other in pairs])


def race(contestants: Mapping[str, Contestant], runs: int, clock: Clock) -> Times:
    """Warm every contestant up, then measure all of them in each of `runs` rounds."""
    repeats = {name: _repeats(contestant, clock) for name, contestant in contestants.items()}
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(runs):
        for name in rotated(list(contestants), number):
            seconds[name].append(clock.seconds(contestants[name], repeats[name]))
    return Times(seconds)


def rotated(names: Sequence[str], number: int) -> list[str]:
    """The order of round `number`: each contestant is the first one in its turn."""
    first = number % len(names)
    return [*names[first:], *names[:first]]


def _repeats(contestant: Contestant, clock: Clock) -> int:
    """Runs that make up one measurement. The first run may compile something, so the second one tells."""
    clock.seconds(contestant, 1)
    once = clock.seconds(contestant, 1)
    return min(MOST_REPEATS, max(1, math.ceil(SHORTEST / max(once, 1e-9))))
