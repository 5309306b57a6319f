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
    # One reduced number says whether any rank has failed, and which one first. Only then is anything else sent:
    # gathering everyone's answer would take W messages on each of W ranks, several times per saved state.
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    failed = torch.tensor(world if failure is None else rank, device=_device())
    torch.distributed.all_reduce(failed, torch.distributed.ReduceOp.MIN)
    first = int(failed.item())
    if first == world:
        return result  # type: ignore[return-value]  # nothing failed, so `work` has returned
    sent = [_sendable(failure)]
    torch.distributed.broadcast_object_list(sent, src=first)
    if failure is not None and not isinstance(failure, ClDistError):
        raise failure
    assert sent[0] is not None  # the rank that sent it has failed
    raise sent[0] from failure


def _device() -> torch.device:
    """Where collectives take tensors from: NCCL only from a GPU, Gloo from memory."""
    nccl = torch.distributed.get_backend() == torch.distributed.Backend.NCCL
    return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")


def _sendable(failure: Exception | None) -> ClDistError | None:
    """The failure as an error of our own: an arbitrary exception may not survive pickling."""
    if failure is None or isinstance(failure, ClDistError):
        return failure
    return ClDistError(f"rank {torch.distributed.get_rank()} failed: {type(failure).__name__}: {failure}")


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
