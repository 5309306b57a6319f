"""Being asked to stop, by a signal or because the time is nearly over: all ranks act on it at the same step."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from types import FrameType

import torch

from cl_dist.engine.distributed import device
from cl_dist.stop_requests import StopRequests, heeded

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


class StopRequest:
    """Catches SIGINT, SIGTERM, SIGUSR1 and SIGHUP; a second request ends the process at once (`StopRequests`).

    Args:
        is_due: Asked at every step: whether this rank must stop without a signal.
    """

    def __init__(self, is_due: Callable[[], bool] = lambda: False) -> None:
        self._is_due = is_due
        self._requests = StopRequests()
        self._previous = {number: signal.signal(number, self._ask) for number in heeded(SIGNALS)}

    def _ask(self, number: int, _: FrameType | None) -> None:
        if self._requests.ends_at_once(number, time.monotonic()):
            os._exit(128 + number)

    def agreed(self) -> bool:
        """Whether any rank was asked to stop (collective: every rank gets the same answer)."""
        return self.agreed_with()[0]

    def agreed_with(self, *values: float) -> tuple[bool, list[float]]:
        """`agreed`, and in the same all-reduce the sums over ranks of some numbers of the step."""
        wanted = self._requests.asked or self._is_due()
        message = torch.tensor([wanted, *values], dtype=torch.float64, device=device())
        torch.distributed.all_reduce(message)
        asked, *sums = message.tolist()
        return asked > 0, sums

    def close(self) -> None:
        """Put the former signal handlers back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
