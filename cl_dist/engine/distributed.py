"""A rank's life in the process group: quiet the libraries, join, measure memory, leave."""

from __future__ import annotations

import logging
import os
import resource
import sys
import warnings
from datetime import timedelta
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch

from cl_dist.engine.collective_errors import reporting_lost_ranks
from cl_dist.engine.device import agree_on_devices, choose_device, device, uses_gpu
from cl_dist.engine.loopback import init_method
from cl_dist.heartbeat import beat
from cl_dist.machine import Device, DeviceSetting
from cl_dist.stop_requests import imports


def quiet_libraries(rank: int) -> None:
    """Silence the libraries' progress bars and DeepSpeed's narration; warnings about real problems stay.

    Only rank 0 prints the project's own notices.
    """
    import transformers

    if rank != 0:
        logging.getLogger("cl_dist").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    # Only some runs import datasets (with pandas and pyarrow), and it reads this when it is imported.
    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    if "datasets" in sys.modules:
        sys.modules["datasets"].disable_progress_bars()
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # DeepSpeed calls a collective by a name that torch has deprecated.
    warnings.filterwarnings("ignore", message=".*torch.distributed.*deprecated", category=FutureWarning)


class Joined(NamedTuple):
    """A rank's place in the process group, and what it computes on."""

    rank: int
    world: int
    device: Device
    """On rank 0 the devices of all ranks in one record."""
    notice: str | None = None
    """Why GPUs that exist are not used; None if they are, or if nobody asked for them."""

    def describe(self) -> str:
        """The run's first line: how many ranks there are, and on what."""
        ranks = "1 rank" if self.world == 1 else f"{self.world} ranks"
        kind = "on the CPU" if self.device.kind == "cpu" else "on a GPU each" if self.world > 1 else "on a GPU"
        return f"{ranks} {kind}: {self.device.describe()}"

    def to_dict(self) -> dict[str, Any]:
        """What the run computes on, for metrics.json; `count` is the number of GPUs, `notice` why there are none."""
        facts = self.device.to_dict()
        facts |= {} if self.device.kind == "cpu" else {"count": self.world}
        return facts | ({} if self.notice is None else {"notice": self.notice})

    def warning(self, work: str = "training") -> str | None:
        """What to print loudly if a GPU is not used that could have been meant; `work` is what the ranks do."""
        if self.notice is None:
            return None
        return (
            f"WARNING: {work} on the CPU, although this machine has a GPU: {self.notice}. launch.device=cuda would "
            "stop here, launch.device=cpu says that this is intended"
        )


def join(timeout_seconds: float, device_setting: DeviceSetting = "auto") -> Joined:
    """Initialise torch.distributed through DeepSpeed from RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.

    Args:
        timeout_seconds: A collective that takes longer ends the run.
        device_setting: `launch.device`.

    Raises:
        BadInput: The ranks cannot compute on what `launch.device` says, or not all on the same kind of device, or
            there are more ranks on this machine than GPUs.
        RankLost: Not all ranks arrive in time.
    """
    choice = choose_device(device_setting)
    with imports():
        import deepspeed

    # DeepSpeed would compile a shared-memory collective that only its inference uses: two minutes on a cold start. It
    # looks up no other entry of this table. Replace the table instead of editing it: DeepSpeed fills it on first access
    # by running compilers, whose messages ("cannot find -laio") would open every run.
    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    beat(f"meeting at {os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}")
    rank = int(os.environ.get("RANK", "0"))
    found = [choice.device]

    def agree(store: Any, rank: int, world: int, timeout: timedelta) -> None:
        found[0] = agree_on_devices(store, rank, world, choice, timeout)

    with reporting_lost_ranks(rank, timeout_seconds, lambda reason, _: reason):
        deepspeed.init_distributed(
            dist_backend="nccl" if uses_gpu() else "gloo",
            init_method=init_method(agree),
            rank=rank,
            world_size=int(os.environ.get("WORLD_SIZE", "1")),
            timeout=timedelta(seconds=timeout_seconds),
            auto_mpi_discovery=False,
            verbose=False,
        )
    return Joined(torch.distributed.get_rank(), torch.distributed.get_world_size(), found[0], choice.notice)


def set_timeout(timeout_seconds: float) -> None:
    """Apply the run's timeout to every existing process group.

    DeepSpeed creates groups of its own to reduce gradients, and they start with torch's default: 30 minutes with Gloo,
    10 with NCCL, whatever `join` was given.
    """
    from torch.distributed import distributed_c10d

    for group in list(distributed_c10d._world.pg_map):
        distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_seconds), group)


def peak_memory() -> int:
    """This rank's peak memory in bytes: allocated on its GPU, or resident in RAM without one."""
    if uses_gpu():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def numbers_per_rank(number: int) -> list[int]:
    """The number that each rank calls this with (collective)."""
    own = torch.tensor(number, device=device())
    everyone = [torch.zeros_like(own) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(everyone, own)
    return [int(value) for value in everyone]


def free_memory() -> int:
    """Bytes that this rank may still allocate: on its GPU, or without one its share of the machine's memory."""
    if uses_gpu():
        free, _ = torch.cuda.mem_get_info()
        return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or torch.distributed.get_world_size())
    return min(_available_memory(), _left_in_container()) // ranks


def _available_memory() -> int:
    """Linux's estimate of what processes can allocate without swapping, in bytes."""
    with open("/proc/meminfo", encoding="ascii") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def _left_in_container(mount: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """Bytes below the memory limits of this process's control group and of those around it: of a container, say, or of
    a Slurm step. No limit is a very large number.

    Both versions of control groups: the kernel's documents admin-guide/cgroup-v2 and admin-guide/cgroup-v1/memory.
    """
    left = sys.maxsize
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:
        return left
    for line in lines:  # `0::/path` in version 2, `7:memory:/path` in version 1
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            top, names = mount, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            top, names = mount / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        group = PurePosixPath(path.lstrip("/"))
        # In a container, the path may be that of the host, which does not exist here; the top then is its own group.
        left = min([left, *(_left_in_group(top / each, *names) for each in (group, *group.parents))])
    return left


def _left_in_group(folder: Path, limit: str, used: str, reclaimable: str) -> int:
    """Bytes below the limit of one control group. Pages of files that nobody uses do not count as used."""
    try:
        most, now = ((folder / name).read_text(encoding="utf-8").strip() for name in (limit, used))
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="utf-8").splitlines())
    except OSError:
        return sys.maxsize
    return sys.maxsize if most == "max" else max(0, int(most) - int(now) + int(statistics.get(reclaimable, 0)))


def leave() -> None:
    """Wait for the other ranks, then destroy the process group; without the barrier some ranks abort at exit."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
