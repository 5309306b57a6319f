"""A collective operation that fails: one sentence with rank and phase in place of a page of traceback."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from cl_dist.errors import RankLost
from cl_dist.heartbeat import last_beat

_TIMED_OUT = ("timed out", "timeout")
"""Of Gloo, the rendezvous and NCCL, in small letters."""
_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused", "Socket closed")

GiveUp = Callable[[str, str], str]
"""Called with what happened and the traceback; returns the sentence to fail with."""


@contextmanager
def telling_broken_collectives(rank: int, timeout_seconds: float, give_up: GiveUp) -> Iterator[None]:
    """Turn the errors of collective operations inside the block into a `RankLost` that names rank and phase.

    Args:
        rank: This process's rank.
        timeout_seconds: What the process group was given.
        give_up: Called where an operation took too long: the ranks are still there, and can say where they are.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_collective(error):
            raise
        text, phase = str(error), last_beat().phase
        if any(sign in text for sign in _LOST):
            lost = f"rank {rank} lost another rank, which has ended or is out of reach, while {phase}"
            raise RankLost(f"{lost}; --resume goes on from the last saved state") from error
        if not any(sign in text.lower() for sign in _TIMED_OUT):
            raise
        waited = f"rank {rank} waited longer than {timeout_seconds:g} s (launch.timeout_seconds) for the others"
        raise RankLost(give_up(f"{waited} while {phase}", traceback.format_exc())) from error


def is_collective(error: RuntimeError) -> bool:
    """Whether torch.distributed raised it; Gloo's errors have no class of their own, but name its source files."""
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error).lower()
