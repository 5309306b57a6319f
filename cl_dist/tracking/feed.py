"""Passes values to a tracker from a thread of its own, so that the run neither waits for it nor fails with it."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from cl_dist.heartbeat import beat
from cl_dist.tracking.tracker import RunFacts, Tracker

WAITING = 10_000
"""Most values that wait for a tracker; with more, it is given up."""
FINISH_SECONDS, STOP_SECONDS = 60.0, 10.0
"""How long the end of a run waits for what a tracker still has to send; a run that was stopped or failed has less time,
because its job may be about to be killed."""


class Feed:
    """One tracker. `failure` says why it is no longer fed, if it is not.

    Args:
        name: The tracker's name in a recipe.
        make: Makes the tracker, in its thread.
        run: What it is told about the run.
        started: Called from the tracker's thread with what identifies its run.
    """

    def __init__(self, name: str, make: Callable[[], Tracker], run: RunFacts, started: Callable[[str], None]) -> None:
        self.name = name
        self.failure: str | None = None
        self._calls: queue.Queue[tuple[str, tuple[Any, ...]] | None] = queue.Queue(WAITING)
        self._make, self._run, self._started = make, run, started
        # A daemon: a library that hangs does not keep the process alive.
        self._thread = threading.Thread(target=self._serve, name=f"tracking by {name}", daemon=True)
        self._thread.start()

    def put(self, call: str, *arguments: Any) -> None:
        """Have the tracker's method `call` called; returns at once."""
        if self.failure is None:
            try:
                self._calls.put_nowait((call, arguments))
            except queue.Full:
                self.failure = f"{WAITING:,} values are waiting for it"

    def finish(self, status: str, seconds: float | None = None) -> None:
        """Let the tracker finish, and wait for it at most `seconds` (None: as the status says)."""
        self.put("finish", status)
        if self.failure is not None:
            return
        if seconds is None:
            seconds = FINISH_SECONDS if status == "finished" else STOP_SECONDS
        deadline = time.monotonic() + seconds
        with suppress(queue.Full):  # it hangs, which shows below
            self._calls.put(None, timeout=seconds)
        while self._thread.is_alive() and time.monotonic() < deadline:
            beat(f"waiting for {self.name}")
            self._thread.join(min(1.0, seconds))
        if self._thread.is_alive():
            self.failure = f"it did not finish within {seconds:g} s"

    def _serve(self) -> None:
        try:
            tracker = self._make()
            identity = tracker.start(self._run)
            if identity is not None:
                self._started(identity)
            while (call := self._calls.get()) is not None:
                method, arguments = call
                getattr(tracker, method)(*arguments)
        except BaseException as error:  # a library may even call sys.exit
            gist = " ".join(str(error).split())[:300]
            self.failure = f"{type(error).__name__}: {gist}" if gist else type(error).__name__
