"""Is the job's time so nearly over that the state must be saved now? Judged by how long saving has taken so far."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

MARGIN_SECONDS = 10.0
"""For what is not measured: the agreement of the ranks, their end, and Slurm's own delay."""
SAVE_FACTOR = 2.0
"""A file system that others use too may be slower the next time."""
UNMEASURED_SHARE, UNMEASURED_SECONDS = 0.1, 120.0
"""Before anything has been saved, saving is taken to need this share of the time, or so long where that is less."""

SecondsLeft = Callable[[], float | None]


def no_limit() -> None:
    """The time left of a run that nobody ends."""
    return None


class Deadline:
    """The end of the time that a run has, seen by one rank.

    Args:
        seconds_left: How long this process may still run; None: for ever.
    """

    def __init__(self, seconds_left: SecondsLeft = no_limit) -> None:
        self._seconds_left = seconds_left
        self._at_first = seconds_left()
        self._slowest_save: float | None = None
        self._step = 0.0

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Around everything that saves the state: measures it."""
        began = time.monotonic()
        yield
        self._slowest_save = max(self._slowest_save or 0.0, time.monotonic() - began)

    def stepped(self, seconds: float) -> None:
        """Note how long the last step took: the next decision is that much later."""
        self._step = seconds

    @property
    def needed(self) -> float:
        """Seconds that one more step and saving after it may take."""
        save = self._slowest_save
        if save is None:
            save = min(UNMEASURED_SECONDS, UNMEASURED_SHARE * (self._at_first or UNMEASURED_SECONDS))
        return SAVE_FACTOR * save + self._step + MARGIN_SECONDS

    def is_near(self) -> bool:
        """Whether another step might be one too many."""
        left = self._seconds_left()
        return left is not None and left < self.needed
