"""Turns the errors of collective operations into one sentence with rank and phase, instead of a page of traceback."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from cl_dist import collective_texts
from cl_dist.collective_texts import meaning, nccl_detail
from cl_dist.errors import ClDistError, RankLost
from cl_dist.heartbeat import last_beat

_BROKEN_GPU = ("uncorrectable ecc error", "uncorrectable nvlink error", "gpu is lost", "device is lost")
"""CUDA's errors of a device that has failed, in lower case. (Other errors of CUDA come from programs.)"""

GiveUp = Callable[[str, str], str]
"""Called with the reason and the traceback; returns the sentence to fail with."""


@contextmanager
def reporting_lost_ranks(rank: int, timeout_seconds: float, give_up: GiveUp) -> Iterator[None]:
    """Turn collective errors, and those of a GPU that has failed, into a `RankLost` that names rank and phase.

    Args:
        rank: This process's rank.
        timeout_seconds: The process group's timeout, for the message.
        give_up: Called on a timeout: the other ranks are still there and can report where they hang.

    Raises:
        ClDistError: NCCL's buffers do not fit into /dev/shm, which a restart would not change.
    """
    try:
        yield
    except RuntimeError as error:
        text, phase = str(error), last_beat().phase
        if is_broken_gpu(error):
            failed = f"rank {rank} lost its GPU while {phase}: {text.splitlines()[0]}"
            raise RankLost(f"{failed}; continue from the last saved state with --resume") from error
        what = meaning(text) if is_collective(error) else None
        if what is None:
            raise
        detail = f" ({found})" if (found := nccl_detail(text)) is not None else ""
        if what == "lost":
            lost = f"rank {rank} lost another rank, which has ended or cannot be reached, while {phase}{detail}"
            raise RankLost(f"{lost}; continue from the last saved state with --resume") from error
        if what == "shared memory":
            raise ClDistError(
                f"rank {rank}: NCCL's buffers do not fit into /dev/shm while {phase}{detail}: enlarge it (docker run "
                "--shm-size=16g or --ipc=host), or set NCCL_SHM_DISABLE=1"
            ) from error
        waited = f"rank {rank} waited longer than {timeout_seconds:g} s (launch.timeout_seconds) for the others"
        raise RankLost(give_up(f"{waited} while {phase}{detail}", traceback.format_exc())) from error


def is_collective(error: RuntimeError) -> bool:
    """Whether torch.distributed raised it."""
    return isinstance(error, torch.distributed.DistError) or collective_texts.is_collective(str(error))


def is_broken_gpu(error: RuntimeError) -> bool:
    """Whether a GPU has failed, so that the same program would run on another one."""
    text = str(error).lower()
    return "cuda" in text and any(sign in text for sign in _BROKEN_GPU)
