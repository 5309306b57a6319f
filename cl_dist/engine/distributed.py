"""A rank's life in the process group: quiet the libraries, join, find the device, measure memory, leave."""

from __future__ import annotations

import logging
import os
import resource
import sys
import warnings
from datetime import timedelta
from pathlib import Path

import torch

from cl_dist.engine.collective_errors import reporting_lost_ranks
from cl_dist.engine.loopback import init_method
from cl_dist.errors import BadInput
from cl_dist.heartbeat import beat


def quiet_libraries(rank: int) -> None:
    """Silence the libraries' progress bars and DeepSpeed's narration; warnings about real problems stay.

    Only rank 0 prints the project's own notices.
    """
    import datasets
    import transformers

    if rank != 0:
        logging.getLogger("cl_dist").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # DeepSpeed calls a collective by a name that torch has deprecated.
    warnings.filterwarnings("ignore", message=".*torch.distributed.*deprecated", category=FutureWarning)


def join(timeout_seconds: float) -> tuple[int, int]:
    """Initialise torch.distributed through DeepSpeed from RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.

    Args:
        timeout_seconds: A collective that takes longer ends the run.

    Returns:
        (rank, world size).

    Raises:
        BadInput: There are more ranks on this machine than GPUs.
        RankLost: Not all ranks arrive in time.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    if torch.cuda.is_available():
        torch.cuda.set_device(_own_gpu())
    # DeepSpeed would compile a shared-memory collective that only its inference uses: two minutes on a cold start. It
    # looks up no other entry of this table. Replace the table instead of editing it: DeepSpeed fills it on first access
    # by running compilers, whose messages ("cannot find -laio") would open every run.
    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    beat(f"meeting at {os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}")
    rank = int(os.environ.get("RANK", "0"))
    with reporting_lost_ranks(rank, timeout_seconds, lambda reason, _: reason):
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


def _own_gpu() -> int:
    rank, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if rank >= gpus:
        raise BadInput(
            f"launch.processes: rank {rank} of this machine has no GPU to itself, there are {gpus}; use at most {gpus} "
            "ranks, or any number on the CPU with CUDA_VISIBLE_DEVICES= (empty)"
        )
    return rank


def set_timeout(timeout_seconds: float) -> None:
    """Apply the run's timeout to every existing process group.

    DeepSpeed creates groups of its own to reduce gradients, and they start with torch's default: 30 minutes with Gloo,
    10 with NCCL, whatever `join` was given.
    """
    from torch.distributed import distributed_c10d

    for group in list(distributed_c10d._world.pg_map):
        distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_seconds), group)


def device() -> torch.device:
    """Return the device that this rank computes on."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def peak_memory_per_rank() -> list[int]:
    """Return each rank's peak memory in bytes: allocated on its GPU, or resident in RAM without one (collective)."""
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
    own = torch.tensor(peak, device=device())
    everyone = [torch.zeros_like(own) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(everyone, own)
    return [int(value) for value in everyone]


def free_memory() -> int:
    """Bytes that this rank may still allocate: on its GPU, or without one its share of the machine's memory."""
    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or torch.distributed.get_world_size())
    return min(_available_memory(), _left_in_container()) // ranks


def _available_memory() -> int:
    """Linux's estimate of what processes can allocate without swapping, in bytes."""
    with open("/proc/meminfo", encoding="ascii") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def _left_in_container(folder: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes below the memory limit of this process's container; no limit is a very large number."""
    try:
        limit, used = ((folder / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:  # no container, or control groups of version 1
        return sys.maxsize
    return sys.maxsize if limit == "max" else max(0, int(limit) - int(used))


def leave() -> None:
    """Wait for the other ranks, then destroy the process group; without the barrier some ranks abort at exit."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
