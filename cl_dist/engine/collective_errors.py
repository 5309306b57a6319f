"""Turns the errors of collective operations into one sentence with rank and phase, instead of a page of traceback."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from cl_dist.errors import RankLost
from cl_dist.heartbeat import last_beat

# These errors carry no code: only their wording separates a lost rank from a timeout, in Gloo, NCCL and the rendezvous.
_TIMED_OUT = ("timed out", "timeout")
"""Compared in lower case."""
_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused", "Socket closed")

GiveUp = Callable[[str, str], str]
"""Called with the reason and the traceback; returns the sentence to fail with."""


@contextmanager
def reporting_lost_ranks(rank: int, timeout_seconds: float, give_up: GiveUp) -> Iterator[None]:
    """Turn collective errors inside the block into a `RankLost` that names rank and phase.

    Args:
        rank: This process's rank.
        timeout_seconds: The process group's timeout, for the message.
        give_up: Called on a timeout: the other ranks are still there and can report where they hang.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_collective(error):
            raise
        text, phase = str(error), last_beat().phase
        if any(sign in text for sign in _LOST):
            lost = f"rank {rank} lost another rank, which has ended or cannot be reached, while {phase}"
            raise RankLost(f"{lost}; continue from the last saved state with --resume") from error
        if not any(sign in text.lower() for sign in _TIMED_OUT):
            raise
        waited = f"rank {rank} waited longer than {timeout_seconds:g} s (launch.timeout_seconds) for the others"
        raise RankLost(give_up(f"{waited} while {phase}", traceback.format_exc())) from error


def is_collective(error: RuntimeError) -> bool:
    """Whether torch.distributed raised it. Gloo's errors have no class, but their text names its source files."""
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error).lower()
