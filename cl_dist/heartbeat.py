"""Marks of progress: whatever works calls `beat`, and the watchdog of the process looks at how old the last one is.

One for the whole process, like a log: progress is made by components that know nothing of each other. A mark costs less
than a microsecond.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple


class Beat(NamedTuple):
    """The newest mark."""

    number: int
    """How many there have been."""
    time: float
    """When it was made, by `time.monotonic()`, seconds."""
    phase: str
    """What the process is doing, to be read after "while": "training task a, step 3"."""
    opaque: bool
    """Whether a library is at work that makes no marks: its use of the processor counts as progress then."""


_last = Beat(0, time.monotonic(), "starting", opaque=False)


def beat(phase: str | None = None, opaque: bool = False) -> None:
    """Say that something was got done, and what comes next.

    Args:
        phase: To be read after "while"; None: more of the same.
        opaque: What comes next may take long without a mark, as when a library loads a model.
    """
    global _last
    if phase is None:
        phase, opaque = _last.phase, _last.opaque
    _last = Beat(_last.number + 1, time.monotonic(), phase, opaque)


@contextmanager
def opaque() -> Iterator[None]:
    """Around what a library does without a mark, inside a phase that makes marks otherwise."""
    before = _last
    beat(before.phase, opaque=True)
    try:
        yield
    finally:
        beat(before.phase, opaque=before.opaque)


def last_beat() -> Beat:
    """The newest mark of this process."""
    return _last
