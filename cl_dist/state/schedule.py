"""When a checkpoint inside a task is due."""

from __future__ import annotations

import time
from collections.abc import Callable

from cl_dist.config.schema import CheckpointConfig


class CheckpointSchedule:
    """Counts steps, and minutes since the last save or since training of the task began.

    Args:
        config: The recipe's `checkpoint` entry.
        clock: Returns seconds.
    """

    def __init__(self, config: CheckpointConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._config, self._clock = config, clock
        self.restart()

    def restart(self) -> None:
        """The state was saved, or training begins: the minutes count from here."""
        self._since = self._clock()

    def minutes_over(self) -> bool:
        """Whether `every_minutes` have passed on this rank's clock; the ranks agree before they act on it."""
        minutes = self._config.every_minutes
        return minutes is not None and self._clock() - self._since >= 60.0 * minutes

    def due(self, step: int, minutes_over: bool) -> bool:
        """Whether to save after `step` optimiser steps of the task, given what the ranks agreed on the minutes."""
        steps = self._config.every_steps
        return minutes_over or (steps is not None and step % steps == 0)
