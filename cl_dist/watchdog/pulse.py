"""What a rank tells the others about its progress: one small file per rank, written over and over.

A plain file on a file system that all ranks share needs no rank to serve it: one that is stopped, or whose node is
gone, shows by its file not changing any more. The file is written in place and opened anew for every reading: NFS looks
for changes when a file is opened, and a full disk has room for what is there already.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

_BYTES = 1024
"""Of a pulse in its file, filled up with blanks: the next one covers it whole."""
_PHASE_CHARACTERS = 120


@dataclass(frozen=True)
class Pulse:
    """One rank's state of progress, as of its writing."""

    number: int
    """Counts the rank's pulses: one that stays the same comes from a process that is stopped or gone."""
    age: float
    """Seconds since the rank's last mark of progress, without the time in which its process was suspended."""
    phase: str
    """What it is doing, to be read after "while"."""
    waiting: bool
    """Whether one of its threads is inside a collective operation."""
    told: bool = False
    """Whether it has written its stacks."""


class PulseFiles:
    """The pulses of all ranks of a job in one folder.

    Args:
        folder: A folder that all ranks share.
        world: How many ranks there are.
    """

    def __init__(self, folder: Path, world: int) -> None:
        self.folder, self.world = folder, world

    def path(self, rank: int) -> Path:
        """The file of a rank."""
        return self.folder / f".heartbeat-rank{rank}.json"

    def write(self, rank: int, pulse: Pulse) -> None:
        """Replace a rank's pulse; raises OSError."""
        text = json.dumps({**asdict(pulse), "phase": pulse.phase[:_PHASE_CHARACTERS]})
        descriptor = os.open(self.path(rank), os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            os.write(descriptor, text.ljust(_BYTES).encode())
        finally:
            os.close(descriptor)

    def read(self, rank: int) -> Pulse | None:
        """A rank's newest pulse; None where there is none, or none that can be read now."""
        try:
            return Pulse(**json.loads(self.path(rank).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def clear(self) -> None:
        """Forget all pulses, also those of a former job of more ranks; only before the first rank writes."""
        for path in self.folder.glob(".heartbeat-rank*"):
            path.unlink(missing_ok=True)

    def remove(self, rank: int) -> None:
        """Forget a rank's pulse: it has ended in good order."""
        self.path(rank).unlink(missing_ok=True)
