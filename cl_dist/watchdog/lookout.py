"""Looks at the pulses of the other ranks, again and again: only that shows whether they change."""

from __future__ import annotations

from cl_dist.watchdog.pulse import Pulse, PulseFiles
from cl_dist.watchdog.verdict import Sighting


class Lookout:
    """What one rank has seen of the others.

    Args:
        files: Where their pulses are.
        rank: The rank that looks.
    """

    def __init__(self, files: PulseFiles, rank: int) -> None:
        self._files, self._others = files, [other for other in range(files.world) if other != rank]
        self._seen: dict[int, tuple[Pulse | None, float]] = {}
        """The newest pulse of each, and when it was new."""

    def look(self, now: float) -> None:
        """Read all pulses; `now` is the time in seconds, by whatever clock."""
        for rank in self._others:
            pulse, before = self._files.read(rank), self._seen.get(rank)
            if before is None or (pulse is not None and pulse != before[0]):
                self._seen[rank] = (pulse, now)

    def forget(self) -> None:
        """Begin anew: what is not looked at for a while says nothing about silence."""
        self._seen = {}

    def sightings(self, now: float) -> dict[int, Sighting]:
        """What is known of every other rank; of one that was not looked at, nothing."""
        seen = self._seen
        return {rank: Sighting(seen[rank][0], now - seen[rank][1]) if rank in seen else Sighting(None, 0.0)
                for rank in self._others}  # fmt: skip
