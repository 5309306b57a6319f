"""Checkpoints of the current task: when one is due, which ones are kept, and which one a resume uses."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from cl_dist.config.schema import CheckpointConfig
from cl_dist.state.integrity import CheckpointDamaged
from cl_dist.state.ledger import Ledger
from cl_dist.state.manifest import CheckpointEntry


class CheckpointSchedule:
    """When a checkpoint is due: after N steps, or N minutes after the last save or the start of the task.

    Args:
        config: The recipe's `checkpoint` entry.
        clock: Returns seconds.
    """

    def __init__(self, config: CheckpointConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._config, self._clock = config, clock
        self.restart()

    def restart(self) -> None:
        """Count the minutes from now: the state was saved, or training begins."""
        self._since = self._clock()

    def minutes_over(self) -> bool:
        """Whether `every_minutes` have passed on this rank's clock; the ranks must agree before they act on it."""
        minutes = self._config.every_minutes
        return minutes is not None and self._clock() - self._since >= 60.0 * minutes

    def due(self, step: int, minutes_over: bool) -> bool:
        """Whether to save after `step` optimiser steps of the task; `minutes_over` is what the ranks agreed on."""
        steps = self._config.every_steps
        return minutes_over or (steps is not None and step % steps == 0)


class Restored(NamedTuple):
    """A state that has been loaded."""

    entry: CheckpointEntry
    state: dict[str, Any]
    """Its JSON values."""


class Checkpoints:
    """The checkpoints of the current task, the same on all ranks; only rank 0 deletes files.

    Args:
        ledger: Its manifest lists them.
        keep: How many of the newest are kept.
        report: Called with one line about each damaged checkpoint.
    """

    def __init__(self, ledger: Ledger, keep: int, report: Callable[[str], None]) -> None:
        self._ledger, self._keep, self._report = ledger, keep, report

    def add(self, entry: CheckpointEntry) -> None:
        """Add a checkpoint that is already on disk to the manifest, and only then delete those that are too old."""
        others = [other for other in self._ledger.manifest.checkpoints if other.folder != entry.folder]
        self._ledger.update(checkpoints=(*others, entry)[-self._keep :])
        self.forget_strays()

    def forget_strays(self) -> None:
        """Delete checkpoints that the manifest does not list, such as those that a kill left behind."""
        if self._ledger.writer:
            named = [self._ledger.folder.path / entry.folder for entry in self._ledger.manifest.checkpoints]
            self._ledger.folder.forget_checkpoints(but=named)

    def restore(self, load: Callable[[Path], dict[str, Any]]) -> Restored | None:
        """Load the newest intact checkpoint; None if the manifest lists none, or only damaged ones.

        Args:
            load: Loads a folder. Raises `CheckpointDamaged` on all ranks, before it changes anything. Other exceptions
                are passed on: a state that cannot be read today may be readable tomorrow.
        """
        for entry in reversed(self._ledger.manifest.checkpoints):
            try:
                return Restored(entry, load(self._ledger.folder.path / entry.folder))
            except CheckpointDamaged as error:
                self._report(f"{error}; going back to the state before it")
                self._ledger.log(event="damaged", folder=entry.folder, message=str(error))
        return None

    def forget_after(self, entry: CheckpointEntry | None) -> None:
        """Forget the checkpoints after `entry`, which turned out to be damaged; all of them if it is None."""
        named = self._ledger.manifest.checkpoints
        intact = named[: named.index(entry) + 1] if entry is not None else ()
        if intact != named:
            self._ledger.update(checkpoints=intact)
            self.forget_strays()
