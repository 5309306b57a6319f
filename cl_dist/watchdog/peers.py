"""What a rank knows about the progress of the others, and which rank blocks the job.

Each rank writes its pulse over and over into one small file. A plain file on a shared file system needs no rank to
serve it: a rank that is stopped, or whose node is gone, shows because its file no longer changes. The file is written
in place, so that a full disk has room for it, and opened anew for every read, since NFS checks for changes on open.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from cl_dist.config.words import listed

_BYTES = 1024
"""Size of a pulse in its file, padded with blanks: each write overwrites the previous pulse completely."""
_PHASE_CHARACTERS = 120
_SHOWN_RANKS = 8


@dataclass(frozen=True)
class Pulse:
    """The progress of one rank when it was written."""

    number: int
    """Counts the rank's pulses: if it stays the same, the process is stopped or gone."""
    age: float
    """Seconds since the rank's last mark of progress, not counting time in which the process was suspended."""
    phase: str
    """What the rank is doing, phrased to follow "while"."""
    waiting: bool
    """Whether one of its threads is inside a collective operation."""
    stacks_written: bool = False
    """Whether the rank has written its stacks."""


class PulseFiles:
    """The pulses of all ranks of a job in one folder.

    Args:
        folder: A folder that all ranks share.
        world: World size.
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
        """A rank's latest pulse; None if there is none, or none that can be read at the moment."""
        try:
            return Pulse(**json.loads(self.path(rank).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def clear(self) -> None:
        """Delete all pulses, including those of an earlier job with more ranks; call before the first rank writes."""
        for path in self.folder.glob(".heartbeat-rank*"):
            path.unlink(missing_ok=True)

    def remove(self, rank: int) -> None:
        """Delete the pulse of a rank that ends regularly."""
        self.path(rank).unlink(missing_ok=True)


@dataclass(frozen=True)
class Sighting:
    """What one rank has observed of another rank (or of itself)."""

    pulse: Pulse | None
    """The latest pulse; None if there was none."""
    silent: float
    """Seconds for which the pulse has not changed."""


class Lookout:
    """What one rank has observed of the others. Only repeated reads show whether their pulses change.

    Args:
        files: The pulses.
        rank: The observing rank.
    """

    def __init__(self, files: PulseFiles, rank: int) -> None:
        self._files, self._others = files, [other for other in range(files.world) if other != rank]
        self._seen: dict[int, tuple[Pulse | None, float]] = {}
        """The latest pulse of each rank, and when it first appeared."""

    def look(self, now: float) -> None:
        """Read all pulses; `now` is the current time in seconds, by any clock."""
        for rank in self._others:
            pulse, before = self._files.read(rank), self._seen.get(rank)
            if before is None or (pulse is not None and pulse != before[0]):
                self._seen[rank] = (pulse, now)

    def forget(self) -> None:
        """Start over: after a pause in reading, an old pulse does not mean that a rank is silent."""
        self._seen = {}

    def sightings(self, now: float) -> dict[int, Sighting]:
        """The state of every other rank; a rank whose pulse was not read yet counts as neither silent nor stuck."""
        seen = self._seen
        return {rank: Sighting(seen[rank][0], now - seen[rank][1]) if rank in seen else Sighting(None, 0.0)
                for rank in self._others}  # fmt: skip


@dataclass(frozen=True)
class Limits:
    """Seconds after which a rank counts as stuck."""

    hang: float
    """Without a mark of progress: the rank makes no progress."""
    silence: float
    """Without a new pulse: its process is stopped or gone."""

    def is_silent(self, seen: Sighting) -> bool:
        """Whether the rank gives no sign of life."""
        return seen.silent > self.silence

    def is_stuck(self, seen: Sighting) -> bool:
        """Whether the rank makes no progress."""
        return self.is_silent(seen) or (seen.pulse is not None and seen.pulse.age > self.hang)


def describe(sightings: Mapping[int, Sighting], limits: Limits) -> str:
    """Name the rank that blocks the job, as the middle part of a sentence."""
    # A rank without a sign of life comes first: everyone else is waiting for it.
    silent = [rank for rank, seen in sightings.items() if limits.is_silent(seen)]
    if silent:
        last = sightings[silent[0]].pulse
        where = "" if last is None else f", last seen while {last.phase}"
        if len(silent) == 1:
            return f"rank {silent[0]} gives no sign of life{where} (its process is stopped, or its machine is gone)"
        ranks = name_ranks(silent)
        return f"{ranks} give no sign of life{where} (their processes are stopped, or their machines are gone)"
    # Next come ranks outside of any collective operation, since the ranks inside one wait for them; and among those
    # that remain, the rank whose last mark is oldest.
    pulses = {rank: seen.pulse for rank, seen in sightings.items() if seen.pulse is not None}
    busy = {rank: pulse for rank, pulse in pulses.items() if not pulse.waiting}
    rank = max(busy or pulses, key=lambda rank: pulses[rank].age)
    pulse = pulses[rank]
    if len(sightings) == 1:
        return f"stuck while {pulse.phase}"
    no_progress = f"no progress for {pulse.age:.0f} s while {pulse.phase}"
    if busy:
        return f"rank {rank} has made {no_progress}, and the others wait for it"
    return f"all ranks wait for each other in a collective operation, rank {rank} the longest: {no_progress}"


def name_ranks(ranks: Sequence[int]) -> str:
    """`rank 3`, `ranks 1 and 3`, or the first few of many."""
    return f"rank{'s' if len(ranks) > 1 else ''} {listed(ranks, _SHOWN_RANKS, last='and')}"
