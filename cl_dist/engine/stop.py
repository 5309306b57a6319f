"""Being asked to stop: a signal sets a flag, and all ranks act on it at the same step."""

from __future__ import annotations

import os
import signal
from types import FrameType

import torch

from cl_dist.engine.distributed import device

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Catches SIGINT, SIGTERM and SIGUSR1; a second signal ends the process at once."""

    def __init__(self) -> None:
        self._asked = False
        self._previous = {number: signal.signal(number, self._ask) for number in SIGNALS}

    def _ask(self, number: int, _: FrameType | None) -> None:
        if self._asked:
            os._exit(128 + number)
        self._asked = True

    def agreed(self) -> bool:
        """Whether any rank was asked to stop (collective: every rank gets the same answer)."""
        flag = torch.tensor(int(self._asked), device=device())
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        return bool(flag.item())

    def close(self) -> None:
        """Put the former signal handlers back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
