"""The saved states that the manifest names: adding one, forgetting the oldest, finding the newest that is intact."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from cl_dist.state.integrity import CheckpointDamaged
from cl_dist.state.ledger import Ledger
from cl_dist.state.manifest import CheckpointEntry


class Restored(NamedTuple):
    """A state that was loaded."""

    entry: CheckpointEntry
    state: dict[str, Any]
    """Its JSON values."""


class Checkpoints:
    """Saved states of the task that is under way, on all ranks alike; rank 0 alone deletes.

    Args:
        ledger: Names them on disk.
        keep: How many of the newest are kept.
        tell: Where a damaged state is told of.
    """

    def __init__(self, ledger: Ledger, keep: int, tell: Callable[[str], None]) -> None:
        self._ledger, self._keep, self._tell = ledger, keep, tell

    def add(self, entry: CheckpointEntry) -> None:
        """Name a state that is on the disk, and only then delete those that are too old."""
        others = [other for other in self._ledger.manifest.checkpoints if other.folder != entry.folder]
        self._ledger.update(checkpoints=(*others, entry)[-self._keep :])
        self.forget_strays()

    def forget_strays(self) -> None:
        """Delete what the manifest does not name; a kill may have left it."""
        if self._ledger.writer:
            named = [self._ledger.folder.path / entry.folder for entry in self._ledger.manifest.checkpoints]
            self._ledger.folder.forget_checkpoints(but=named)

    def restore(self, load: Callable[[Path], dict[str, Any]]) -> Restored | None:
        """Load the newest state that is intact; None where the manifest names none, or only damaged ones.

        Args:
            load: Loads a folder; raises `CheckpointDamaged` on all ranks alike, with nothing changed. Whatever else it
                raises goes through: a state that cannot be read today is not given up.
        """
        for entry in reversed(self._ledger.manifest.checkpoints):
            try:
                return Restored(entry, load(self._ledger.folder.path / entry.folder))
            except CheckpointDamaged as error:
                self._tell(f"{error}; going back to the state before it")
                self._ledger.log(event="damaged", folder=entry.folder, message=str(error))
        return None

    def forget_after(self, entry: CheckpointEntry | None) -> None:
        """Forget the states after `entry`, which were found damaged; None: all of them."""
        named = self._ledger.manifest.checkpoints
        intact = named[: named.index(entry) + 1] if entry is not None else ()
        if intact != named:
            self._ledger.update(checkpoints=intact)
            self.forget_strays()
