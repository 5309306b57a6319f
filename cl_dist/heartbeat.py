"""Marks of progress: code that does work calls `beat`, and the process's watchdog checks the age of the last mark.

The mark is global to the process, like a log, because components that know nothing of each other make progress. A call
costs less than a microsecond.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple


class Beat(NamedTuple):
    """The latest mark."""

    number: int
    """Number of marks so far."""
    time: float
    """When it was made, `time.monotonic()` seconds."""
    phase: str
    """What the process is doing, phrased to follow "while": "training task a, step 3"."""
    opaque: bool
    """Whether a library is at work that makes no marks; its processor use then counts as progress."""


_last = Beat(0, time.monotonic(), "starting", opaque=False)


def beat(phase: str | None = None, opaque: bool = False) -> None:
    """Record progress, and what comes next.

    Args:
        phase: What comes next, phrased to follow "while"; None: the current phase continues.
        opaque: The next phase may run for long without a mark, for example while a library loads a model.
    """
    global _last
    if phase is None:
        phase, opaque = _last.phase, _last.opaque
    _last = Beat(_last.number + 1, time.monotonic(), phase, opaque)


@contextmanager
def opaque() -> Iterator[None]:
    """Context of a library call that makes no marks, inside a phase that otherwise makes them."""
    before = _last
    beat(before.phase, opaque=True)
    try:
        yield
    finally:
        beat(before.phase, opaque=before.opaque)


def last_beat() -> Beat:
    """The latest mark of this process."""
    return _last
