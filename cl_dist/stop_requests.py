"""Which signals form one request to stop, and which mean "stop at once". Shared by the launcher and the ranks."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

SAME_PRESS_SECONDS = 0.5
"""SIGINTs this close together are one Ctrl-C: a terminal and a launcher may both forward it."""
SAME_REQUEST_SECONDS = 5.0
"""Other signals this close together are one request: a scheduler sends them both directly and through srun, and a
closed terminal sends SIGHUP both directly and through the shell."""


def heeded(numbers: Iterable[int]) -> list[int]:
    """The signals to handle: all of `numbers`, but SIGHUP only if it is not being ignored (nohup)."""
    ignores_hangups = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [number for number in numbers if not (number == signal.SIGHUP and ignores_hangups)]


class StopRequests:
    """Distinguishes the first request to stop from a second one, which means "do not wait for the save".

    A user who presses Ctrl-C twice is impatient. A scheduler is not: it sends the same signal in several ways at once,
    and SIGTERM at the time limit after SIGUSR1 has warned of it. Ending then would waste a save in progress.
    """

    def __init__(self) -> None:
        self.asked = False
        """Whether any signal has arrived."""
        self._pressed: float | None = None
        """When the first SIGINT arrived."""
        self._same_until = 0.0
        """Until then, signals other than SIGINT belong to the request before."""
        self._warned = False
        """Whether a SIGUSR1 has arrived, but not yet the SIGTERM that it warns of."""

    def ends_at_once(self, number: int, now: float) -> bool:
        """Record a signal that arrives at `now` (seconds, monotonic); returns whether it is a second request."""
        first, self.asked = not self.asked, True
        if number == signal.SIGINT:
            # Measured from the first press, so that holding Ctrl-C down counts as impatience too.
            impatient = self._pressed is not None and now - self._pressed > SAME_PRESS_SECONDS
            self._pressed = now if self._pressed is None else self._pressed
        else:
            # The time limit after its warning is not impatience.
            escalation = number == signal.SIGTERM and self._warned
            impatient = not (first or escalation or now <= self._same_until)
            self._warned = number == signal.SIGUSR1 or (self._warned and not escalation)
            first = first or escalation
        if first:
            self._same_until = now + SAME_REQUEST_SECONDS
        return impatient


_importing = False


def is_importing() -> bool:
    """Whether this process is inside `imports`."""
    return _importing


@contextmanager
def imports() -> Iterator[None]:
    """Context of imports of C extensions, which abort the process if a signal's handler raises an exception in them."""
    global _importing
    _importing = True
    try:
        yield
    finally:
        _importing = False
