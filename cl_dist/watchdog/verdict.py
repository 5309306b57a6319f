"""Who holds the job up? Decided from what one rank has seen of all of them; plain arithmetic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cl_dist.config.words import listed
from cl_dist.watchdog.pulse import Pulse

_SHOWN_RANKS = 8


@dataclass(frozen=True)
class Sighting:
    """What one rank has seen of a rank (or of itself)."""

    pulse: Pulse | None
    """Its newest pulse; None: there was none."""
    silent: float
    """Seconds for which the pulse has not changed."""


@dataclass(frozen=True)
class Limits:
    """After how many seconds what is said of a rank."""

    hang: float
    """Without a mark of progress: it makes none."""
    silence: float
    """Without a new pulse: its process is stopped or gone."""

    def is_silent(self, seen: Sighting) -> bool:
        """Whether the rank gives no sign of life."""
        return seen.silent > self.silence

    def is_stuck(self, seen: Sighting) -> bool:
        """Whether the rank makes no progress."""
        return self.is_silent(seen) or (seen.pulse is not None and seen.pulse.age > self.hang)


def describe(sightings: Mapping[int, Sighting], limits: Limits) -> str:
    """Say which rank holds the job up, as the middle of a sentence.

    A rank that gives no sign of life comes first, then one that makes no progress though it is in no collective
    operation, then the one whose last mark is oldest: the others wait for it.
    """
    silent = [rank for rank, seen in sightings.items() if limits.is_silent(seen)]
    if silent:
        return _silent(silent, sightings[silent[0]])
    pulses = {rank: seen.pulse for rank, seen in sightings.items() if seen.pulse is not None}
    busy = {rank: pulse for rank, pulse in pulses.items() if not pulse.waiting}
    rank = max(busy or pulses, key=lambda rank: pulses[rank].age)
    pulse = pulses[rank]
    if len(sightings) == 1:
        return f"stuck while {pulse.phase}"
    stands = f"no progress for {pulse.age:.0f} s while {pulse.phase}"
    if busy:
        return f"rank {rank} has made {stands}, and the others wait for it"
    return f"all ranks wait for each other in a collective operation, rank {rank} the longest: {stands}"


def _silent(ranks: Sequence[int], first: Sighting) -> str:
    where = "" if first.pulse is None else f", last seen while {first.pulse.phase}"
    if len(ranks) == 1:
        return f"rank {ranks[0]} gives no sign of life{where} (its process is stopped, or its machine is gone)"
    return f"{name_ranks(ranks)} give no sign of life{where} (their processes are stopped, or their machines are gone)"


def name_ranks(ranks: Sequence[int]) -> str:
    """`rank 3`, `ranks 1 and 3`, or the first few of many."""
    return f"rank{'s' if len(ranks) > 1 else ''} {listed(ranks, _SHOWN_RANKS, last='and')}"
