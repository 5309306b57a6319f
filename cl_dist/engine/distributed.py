"""Joining and leaving the process group of a run."""

from __future__ import annotations

import os
from datetime import timedelta

import torch

from cl_dist.engine.broken import telling_broken_collectives
from cl_dist.engine.meeting import init_method
from cl_dist.errors import BadInput
from cl_dist.heartbeat import beat


def join(timeout_seconds: float) -> tuple[int, int]:
    """Initialise torch.distributed through DeepSpeed from RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.

    Args:
        timeout_seconds: A collective that takes longer ends the run.

    Returns:
        (rank, world size).

    Raises:
        BadInput: There are more ranks on this machine than GPUs.
        RankLost: Not all ranks come within the time.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    if torch.cuda.is_available():
        torch.cuda.set_device(_own_gpu())
    # The shared-memory collective serves DeepSpeed's inference only; building it costs two minutes on a cold start. It
    # is all that DeepSpeed looks up in this table. To read the table would fill it first, by running compilers whose
    # messages ("cannot find -laio") would stand at the start of every run.
    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    beat(f"meeting at {os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}")
    rank = int(os.environ.get("RANK", "0"))
    with telling_broken_collectives(rank, timeout_seconds, lambda reason, _: reason):
        deepspeed.init_distributed(
            dist_backend="nccl" if torch.cuda.is_available() else "gloo",
            init_method=init_method(),
            rank=rank,
            world_size=int(os.environ.get("WORLD_SIZE", "1")),
            timeout=timedelta(seconds=timeout_seconds),
            auto_mpi_discovery=False,
            verbose=False,
        )
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def set_timeout(timeout_seconds: float) -> None:
    """Give every process group that there is now the run's timeout.

    The groups that DeepSpeed makes, over which it reduces gradients, begin with torch's own: 30 minutes with Gloo, 10
    with NCCL, whatever `join` was given.
    """
    from torch.distributed import distributed_c10d

    for group in list(distributed_c10d._world.pg_map):
        distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_seconds), group)


def _own_gpu() -> int:
    rank, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if rank >= gpus:
        raise BadInput(
            f"launch.processes: rank {rank} of this machine has no GPU of its own, there are {gpus}; allowed are at "
            f"most {gpus} ranks, or any number on the CPU with CUDA_VISIBLE_DEVICES= (empty)"
        )
    return rank


def leave() -> None:
    """Wait for the others and destroy the process group; without it some ranks abort at exit."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def device() -> torch.device:
    """Return the device that this rank computes on."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
