"""Stopping before the end: a signal asks for it, or the job's time limit is near. All ranks stop at the same step."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import torch

from cl_dist.engine.device import device
from cl_dist.stop_requests import StopRequests, heeded

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)

MARGIN_SECONDS = 10.0
"""For what is not measured: the ranks' agreement, their exit and Slurm's own delay."""
SAVE_FACTOR = 2.0
"""A shared file system may be slower at the next save."""
UNMEASURED_SHARE, UNMEASURED_SECONDS = 0.1, 120.0
"""Until a save has been measured, assume that one takes this share of the time limit, at most this many seconds."""

SecondsLeft = Callable[[], float | None]


def no_limit() -> None:
    """Return the time left to a run without a time limit."""
    return None


class StopRequest:
    """Catches SIGINT, SIGTERM, SIGUSR1 and SIGHUP; a second request ends the process at once (`StopRequests`).

    Args:
        is_due: Called at every step: whether this rank must stop without a signal.
    """

    def __init__(self, is_due: Callable[[], bool] = lambda: False) -> None:
        self._is_due = is_due
        self._requests = StopRequests()
        self._previous = {number: signal.signal(number, self._ask) for number in heeded(SIGNALS)}

    def _ask(self, number: int, _: FrameType | None) -> None:
        if self._requests.ends_at_once(number, time.monotonic()):
            os._exit(128 + number)

    def agreed(self) -> bool:
        """Whether any rank must stop (collective: every rank gets the same answer)."""
        return self.agreed_with()[0]

    def agreed_with(self, *values: float) -> tuple[bool, list[float]]:
        """Return `agreed`, and from the same all-reduce the sums of `values` over all ranks."""
        wanted = self._requests.asked or self._is_due()
        message = torch.tensor([wanted, *values], dtype=torch.float64, device=device())
        torch.distributed.all_reduce(message)
        asked, *sums = message.tolist()
        return asked > 0, sums

    def close(self) -> None:
        """Restore the previous signal handlers."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)


class Deadline:
    """The time limit of the job, as one rank sees it, and how long before it the state must be saved.

    Args:
        seconds_left: How long this process may still run; None: without limit.
    """

    def __init__(self, seconds_left: SecondsLeft = no_limit) -> None:
        self._seconds_left = seconds_left
        self._at_first = seconds_left()
        self._slowest_save: float | None = None
        self._step = 0.0

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Measure a save; wrap everything that writes the state."""
        began = time.monotonic()
        yield
        self._slowest_save = max(self._slowest_save or 0.0, time.monotonic() - began)

    def stepped(self, seconds: float) -> None:
        """Note how long the last step took: the next decision comes that much later."""
        self._step = seconds

    @property
    def needed(self) -> float:
        """Seconds that one more step and a save after it may take."""
        save = self._slowest_save
        if save is None:
            save = min(UNMEASURED_SECONDS, UNMEASURED_SHARE * (self._at_first or UNMEASURED_SECONDS))
        return SAVE_FACTOR * save + self._step + MARGIN_SECONDS

    def is_near(self) -> bool:
        """Whether the time left may not suffice for one more step and a save."""
        left = self._seconds_left()
        return left is not None and left < self.needed
