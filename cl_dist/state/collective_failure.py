"""Work that fails on all ranks if it fails on one."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from cl_dist.errors import ClDistError

Result = TypeVar("Result")


def fail_together(work: Callable[[], Result]) -> Result:
    """Do `work` on this rank; if it fails on one rank, it fails on all of them (collective).

    Otherwise a rank with a full disk or a damaged file would leave the others waiting. `work` itself must not contain
    collective operations.

    Raises:
        ClDistError: The error of the first failing rank, on every rank. An exception of another type is raised
            unchanged on its own rank, and as a ClDistError on the others.
    """
    if not torch.distributed.is_initialized():  # a single process
        return work()
    result: Result | None = None
    failure: Exception | None = None
    try:
        result = work()
    except Exception as error:
        failure = error
    # The other ranks can only be sent errors of our own: an arbitrary exception may not survive pickling.
    sent = failure
    if failure is not None and not isinstance(failure, ClDistError):
        sent = ClDistError(f"rank {torch.distributed.get_rank()} failed: {type(failure).__name__}: {failure}")
    everyone: list[ClDistError | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, sent)
    first = next((error for error in everyone if error is not None), None)
    if first is None:
        return result  # type: ignore[return-value]  # nothing failed, so `work` has returned
    if failure is not None and not isinstance(failure, ClDistError):
        raise failure
    raise first from failure


def on_first_rank(work: Callable[[], Result]) -> Result:
    """Do `work` on rank 0 only, and return its result on every rank (collective).

    Ranks that each read a file on a shared file system may see different versions, because NFS clients cache files.

    Raises:
        ClDistError: As in `fail_together`.
    """
    first = torch.distributed.get_rank() == 0
    shared = [fail_together(lambda: work() if first else None)]
    torch.distributed.broadcast_object_list(shared, src=0)
    return shared[0]  # type: ignore[return-value]  # rank 0's
