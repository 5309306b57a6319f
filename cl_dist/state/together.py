"""Work that all ranks do and that counts as done only where none has failed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from cl_dist.errors import ClDistError

Result = TypeVar("Result")


def together(work: Callable[[], Result]) -> Result:
    """Do `work` on this rank; what fails on one rank fails on all of them (collective).

    Without this a rank whose disk is full or whose file is damaged would leave the others waiting for it. `work` itself
    may not contain collective operations.

    Raises:
        ClDistError: The first failing rank's, on every rank. Any other exception stays as it is on its rank and is told
            as a ClDistError on the others.
    """
    if not torch.distributed.is_initialized():  # a process by itself
        return work()
    result: Result | None = None
    failure: Exception | None = None
    try:
        result = work()
    except Exception as error:
        failure = error
    everyone: list[ClDistError | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, _told(failure))
    first = next((error for error in everyone if error is not None), None)
    if first is None:
        return result  # type: ignore[return-value]  # nothing failed, so `work` has returned
    if failure is not None and not isinstance(failure, ClDistError):
        raise failure
    raise first from failure


def by_first(work: Callable[[], Result]) -> Result:
    """Return on every rank what `work` returns on rank 0, which alone does it (collective).

    Ranks that each read a file of the shared file system may see different versions of it: NFS lets a node keep an old
    one for a while.

    Raises:
        ClDistError: As `together` does.
    """
    first = torch.distributed.get_rank() == 0
    shared = [together(lambda: work() if first else None)]
    torch.distributed.broadcast_object_list(shared, src=0)
    return shared[0]  # type: ignore[return-value]  # rank 0's


def _told(failure: Exception | None) -> ClDistError | None:
    """A failure as the other ranks hear of it."""
    if failure is None or isinstance(failure, ClDistError):
        return failure
    return ClDistError(f"rank {torch.distributed.get_rank()} failed: {type(failure).__name__}: {failure}")
