"""Signals that ask a job to stop: which are one request, and which mean at once. Ranks and launcher agree on it."""

from __future__ import annotations

import signal
from collections.abc import Iterable

SAME_PRESS_SECONDS = 0.5
"""SIGINTs this close together are one Ctrl-C: a terminal and a launcher may both pass it on."""
SAME_REQUEST_SECONDS = 5.0
"""Other signals this close together are one request: a scheduler sends them directly and through srun, and a terminal
that is closed sends SIGHUP itself and through the shell."""


def heeded(numbers: Iterable[int]) -> list[int]:
    """Those of the signals to listen for: SIGHUP stays ignored where it is (nohup)."""
    ignores_hangups = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [number for number in numbers if not (number == signal.SIGHUP and ignores_hangups)]


class StopRequests:
    """Which signals are one request to stop, and which is the second one of somebody who does not want to wait.

    A person is impatient who presses Ctrl-C twice. A scheduler is not: it sends a signal in several ways at once, and
    SIGTERM at the time limit although SIGUSR1 has warned of it; ending then would waste a save that is under way.
    """

    def __init__(self) -> None:
        self.asked = False
        """Whether any signal has come."""
        self._pressed: float | None = None
        """When the first SIGINT came."""
        self._same_until = 0.0
        """Until then all but SIGINT belong to a request that was made."""
        self._warned = False
        """Whether a SIGUSR1 has come, and not yet the SIGTERM that it warns of."""

    def ends_at_once(self, number: int, now: float) -> bool:
        """Take a signal in that comes at `now`, in seconds by a clock that goes on; whether it is a second request."""
        first, self.asked = not self.asked, True
        if number == signal.SIGINT:
            impatient = self._pressed is not None and now - self._pressed > SAME_PRESS_SECONDS
            self._pressed = now if self._pressed is None else self._pressed
        else:
            escalation = number == signal.SIGTERM and self._warned
            impatient = not (first or escalation or now <= self._same_until)
            self._warned = number == signal.SIGUSR1 or (self._warned and not escalation)
            first = first or escalation
        if first:
            self._same_until = now + SAME_REQUEST_SECONDS
        return impatient
