"""What a rank knows about the progress of the others, and which rank blocks the job.

Each rank writes its pulse over and over into one small file. A plain file on a shared file system needs no rank to
serve it: a rank that is stopped, or whose node is gone, shows because its file no longer changes. The file is written
in place, so that a full disk has room for it, and opened anew for every read, since NFS checks for changes on open.

One rank at a time reads the pulses of all others: if all did, W ranks would open W² files at every check, just when
storage may be what keeps them from progress. The rank on duty signs another small file at every check. If the signature
stays the same, some other rank takes over, so the end of a rank, whichever it is, leaves no job unwatched.
"""

from __future__ import annotations

import json
import os
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from cl_dist.config.words import listed

_BYTES = 1024
"""Size of a pulse in its file, padded with blanks: each write overwrites the previous pulse completely."""
_PHASE_CHARACTERS = 120
_SHOWN_RANKS = 8
GRACE = 3
"""Checks without a new signature before other ranks begin to take over: the checks of two ranks are not in step."""


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

    @property
    def signature(self) -> Path:
        """The file that the rank on duty signs."""
        return self.folder / ".heartbeat-duty.json"

    def write(self, rank: int, pulse: Pulse) -> None:
        """Replace a rank's pulse; raises OSError."""
        _overwrite(self.path(rank), {**asdict(pulse), "phase": pulse.phase[:_PHASE_CHARACTERS]})

    def read(self, rank: int) -> Pulse | None:
        """A rank's latest pulse; None if there is none, or none that can be read at the moment."""
        try:
            return Pulse(**json.loads(self.path(rank).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def sign(self, signature: Signature | None) -> None:
        """Replace the signature of the rank on duty; None: no rank is. Raises OSError."""
        _overwrite(self.signature, signature)

    def signed(self) -> Signature | None:
        """The latest signature; None if no rank is on duty, or the file cannot be read at the moment."""
        try:
            return Signature(*json.loads(self.signature.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def claim(self, number: int) -> bool:
        """Whether this rank is the only one to get claim `number`, or claims cannot be made here."""
        try:
            os.close(os.open(self.folder / f".heartbeat-claim{number}", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        except FileExistsError:
            return False
        except OSError:
            pass
        return True

    def clear(self) -> None:
        """Delete what an earlier job left, which may have had more ranks; call before the first rank writes."""
        for path in self.folder.glob(".heartbeat-*"):
            path.unlink(missing_ok=True)

    def remove(self, rank: int) -> None:
        """Delete the files of a rank that ends regularly. It may be the last one, so the signature goes too."""
        self.path(rank).unlink(missing_ok=True)
        self.signature.unlink(missing_ok=True)


class Signature(NamedTuple):
    """Written by the rank on duty at every check."""

    rank: int
    number: int
    """Counts its checks: if it stays the same, the rank is stopped or gone."""


def _overwrite(path: Path, value: object) -> None:
    """Replace the content of a small file in place."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        os.write(descriptor, json.dumps(value).ljust(_BYTES).encode())
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class Sighting:
    """What one rank has observed of another rank (or of itself)."""

    pulse: Pulse | None
    """The latest pulse; None if there was none."""
    silent: float
    """Seconds for which the pulse has not changed, up to the last time it was read."""


class Lookout:
    """What one rank has observed of the others. Only repeated reads show whether their pulses change.

    Args:
        files: The pulses.
        rank: The observing rank.
        clock: Returns seconds, to end a look in time.
    """

    def __init__(self, files: PulseFiles, rank: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._files, self._rank, self._clock = files, rank, clock
        self._others = [other for other in range(files.world) if other != rank]
        self._next = 0
        """Position in `_others` where the next look begins."""
        self._begin()

    def _begin(self) -> None:
        self.on_duty = False
        """Whether this rank reads the pulses for all ranks."""
        self._seen: dict[int, tuple[Pulse | None, float, float]] = {}
        """The latest pulse of each rank, when it first appeared, and when it was last read."""
        self._latest: Signature | None = None
        self._unchanged = -1
        """Number of checks for which `_latest` has been the signature; -1: not read yet."""

    def rest(self) -> None:
        """Leave duty, and start over: after a pause in reading, an old pulse does not mean that a rank is silent."""
        leaves = self.on_duty
        self._begin()
        if leaves:
            self._files.sign(None)

    def check(self, now: float, seconds: float) -> None:
        """Take part in the duty, as a rank without progress does at each of its checks; raises OSError.

        Reads one small file, and as many pulses as `seconds` allow if this rank is on duty. `now` is as in `look`.
        """
        if self._takes_duty():
            self._files.sign(Signature(self._rank, self._number))
            self.look(now, seconds)

    def _takes_duty(self) -> bool:
        """Whether this rank is on duty from now on, or still."""
        found = self._files.signed()
        self._number = 1 if found is None else found.number + 1
        if self.on_duty and (found is None or found.rank == self._rank):
            return True
        if self.on_duty:  # two ranks have taken over at the same time, and the other one has signed later
            self._begin()
        same = found == self._latest and self._unchanged >= 0
        self._latest, self._unchanged = found, self._unchanged + 1 if same else 0
        # Nobody knows which ranks are left, so each draws a lot, and with each check twice as many win: on average one
        # at first, and all of them after log2(W) checks.
        checks = self._unchanged - (0 if found is None else GRACE)
        lot = zlib.crc32(f"{self._rank} {found}".encode()) / 2**32
        self.on_duty = checks >= 0 and lot * self._files.world < 2**checks
        return self.on_duty

    def look(self, now: float, seconds: float = float("inf")) -> None:
        """Read the pulses of the others, or as many as `seconds` allow and the rest at the next look.

        Storage may be slow: a rank that reads for long neither writes its own pulse nor signs.

        Args:
            now: The current time in seconds, by any clock.
            seconds: How long to read.
        """
        began = self._clock()
        for _ in self._others:
            rank = self._others[self._next]
            self._next = (self._next + 1) % len(self._others)
            pulse, before = self._files.read(rank), self._seen.get(rank)
            changed = before is None or (pulse is not None and pulse != before[0])
            self._seen[rank] = (pulse, now, now) if before is None or changed else (before[0], before[1], now)
            if self._clock() - began >= seconds:
                return

    def sightings(self) -> dict[int, Sighting]:
        """The state of every other rank; a rank whose pulse was not read yet counts as neither silent nor stuck."""
        seen = self._seen
        return {rank: Sighting(seen[rank][0], seen[rank][2] - seen[rank][1]) if rank in seen else Sighting(None, 0.0)
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
