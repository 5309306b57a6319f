"""The environment variables of ranks: those of other launchers, and those that our own launcher sets.

Recognises ranks of torchrun, deepspeed, MPI and Slurm, and exports what torch.distributed reads.

Sources: torchrun's environment variables (docs.pytorch.org, elastic/run), Open MPI's mpirun manual (OMPI_COMM_WORLD_*),
MPICH's hydra (PMI_*, MPI_LOCALRANKID), srun's manual (output environment variables).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from cl_dist.errors import BadInput
from cl_dist.launch.rendezvous import DEFAULT_ADDRESS, derived_port, expand_nodes, interface_of, interface_towards
from cl_dist.machine import DEVICE_FILES

INTERFACE = "GLOO_SOCKET_IFNAME"
NCCL_INTERFACE = "NCCL_SOCKET_IFNAME"


@dataclass(frozen=True)
class Ranks:
    """This process's place in the job."""

    rank: int
    world_size: int
    local_rank: int
    """Rank among the ranks on this machine; selects the device."""
    source: str
    """The launcher's name, for messages."""


@dataclass(frozen=True)
class _Launcher:
    """The names of a launcher's environment variables."""

    source: str
    rank: str
    world_size: str
    local_rank: str
    local_size: str
    job: str
    """A variable that is equal on all ranks of a job and differs between jobs."""

    def counts(self, environment: Mapping[str, str]) -> bool:
        """Whether this launcher's variables are set, so that this process is one of its ranks."""
        return self.rank in environment and self.world_size in environment


@dataclass(frozen=True)
class _Slurm(_Launcher):
    """srun. The variables of the job are also set in a batch script, which is not a rank, so only a job step with
    several tasks counts.
    """

    def counts(self, environment: Mapping[str, str]) -> bool:
        """Whether this process is one of several tasks in a job step."""
        return super().counts(environment) and "SLURM_STEP_ID" in environment and environment[self.world_size] != "1"


@dataclass(frozen=True)
class _Mpich(_Launcher):
    """MPICH's hydra. With MpiDefault=pmi2, srun sets PMI_RANK and PMI_SIZE as well."""

    def counts(self, environment: Mapping[str, str]) -> bool:
        """Whether the variables that only hydra sets are present too."""
        return super().counts(environment) and self.local_rank in environment


_TORCH = _Launcher("torchrun or deepspeed", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
_OPEN_MPI = _Launcher(
    "Open MPI's mpirun",
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_SIZE",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
    "PMIX_NAMESPACE",
)
# Not SLURM_NTASKS: the shell that salloc opens is a step with one task, and there SLURM_NTASKS counts the job's tasks.
_SRUN = _Slurm("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE", "SLURM_JOB_ID")
_MPICH = _Mpich("MPICH's mpiexec", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS", "PMI_PORT")
_LAUNCHERS = (_TORCH, _OPEN_MPI, _SRUN, _MPICH)
MPI_SOURCES = (_OPEN_MPI.source, _MPICH.source)


def find_ranks(environment: Mapping[str, str]) -> Ranks | None:
    """This process's rank as set by its launcher; None if no launcher started it.

    Raises BadInput for inconsistent numbers, for a rank without a world size or the reverse, and for two launchers that
    disagree.
    """
    for present, absent in (("RANK", "WORLD_SIZE"), ("WORLD_SIZE", "RANK")):
        if present in environment and absent not in environment:
            raise BadInput(
                f"environment: {present} is {environment[present]}, but {absent} is not set; a launcher sets both. "
                f"Unset {present} to run without a launcher"
            )
    found = [_read(launcher, environment) for launcher in _LAUNCHERS if launcher.counts(environment)]
    if not found:
        return None
    first = found[0]  # the innermost launcher
    for other in found[1:]:
        if _disagree(first, other, environment):
            raise BadInput(
                f"environment: {first.source} says rank {first.rank} of {first.world_size}, but {other.source} says "
                f"{other.rank} of {other.world_size}; unset the variables of the one that did not start this run"
            )
    return first


def is_rank(environment: Mapping[str, str]) -> bool:
    """Whether a launcher made this process a rank, with consistent numbers or not."""
    return any(launcher.counts(environment) for launcher in _LAUNCHERS)


def export_ranks(ranks: Ranks, environment: MutableMapping[str, str]) -> None:
    """Set what torch.distributed reads: RANK, WORLD_SIZE and LOCAL_RANK, and unless they are set already MASTER_ADDR,
    MASTER_PORT and the network interfaces: Gloo's for several machines, the loopback for Gloo and NCCL on one machine.

    Raises BadInput if the ranks are on several machines and the address of the first one is unknown.
    """
    environment["RANK"] = str(ranks.rank)
    environment["WORLD_SIZE"] = str(ranks.world_size)
    environment["LOCAL_RANK"] = str(ranks.local_rank)
    launcher = next(launcher for launcher in _LAUNCHERS if launcher.source == ranks.source)
    if not environment.get("MASTER_ADDR"):
        environment["MASTER_ADDR"] = _address(ranks, launcher, environment)
    if not environment.get("MASTER_PORT"):
        # Not probed, since only rank 0's machine knows which ports are free.
        job = f"{environment.get(launcher.job, '')}.{environment.get('SLURM_STEP_ID', '')}"
        environment["MASTER_PORT"] = str(derived_port(job))
    if not _is_one_machine(launcher, environment):
        if not environment.get(INTERFACE):
            _choose_interface(launcher, environment)
    # On one machine, make Gloo and NCCL listen on the loopback, where no other machine can reach them.
    elif (loopback := interface_of(DEFAULT_ADDRESS)) is not None:
        for name in (INTERFACE, NCCL_INTERFACE):
            environment[name] = environment.get(name) or loopback


def _disagree(inner: Ranks, outer: Ranks, environment: Mapping[str, str]) -> bool:
    """Whether the ranks of two launchers contradict each other.

    Launchers nest: srun may start one torchrun or one MPI daemon per node. Then there are at least as many inner ranks
    as outer ones, and torchrun numbers its ranks in any order. With fewer inner ranks, or with RANK set by hand to
    another number, the variables are leftovers in the shell.
    """
    by_hand = inner.source == _TORCH.source and "TORCHELASTIC_RUN_ID" not in environment
    if by_hand and inner.world_size == outer.world_size:
        return inner.rank != outer.rank
    return inner.world_size < outer.world_size


def _read(launcher: _Launcher, environment: Mapping[str, str]) -> Ranks:
    rank = _number(launcher.rank, environment)
    world_size = _number(launcher.world_size, environment)
    # If all ranks are on this machine, the local rank equals the rank.
    local_rank = _number(
        launcher.local_rank, environment, default=rank if _is_one_machine(launcher, environment) else None
    )
    if world_size < 1 or rank >= world_size or local_rank > rank:
        raise BadInput(
            f"environment: {launcher.rank}={rank}, {launcher.world_size}={world_size} and {launcher.local_rank}="
            f"{local_rank} contradict each other; a rank must be less than the world size, and a local rank at most "
            "the rank"
        )
    return Ranks(rank=rank, world_size=world_size, local_rank=local_rank, source=launcher.source)


def _number(name: str, environment: Mapping[str, str], default: int | None = None) -> int:
    text = environment.get(name)
    if text is None and default is not None:
        return default
    if text is None or not text.isdecimal():
        raise BadInput(f"environment: {name} is {text or 'not set'}; it must be an integer of at least 0")
    return int(text)


def _is_one_machine(launcher: _Launcher, environment: Mapping[str, str]) -> bool:
    if launcher is _SRUN:
        return environment.get("SLURM_STEP_NUM_NODES", environment.get("SLURM_NNODES")) == "1"
    world_size = environment[launcher.world_size]
    return world_size == "1" or environment.get(launcher.local_size) == world_size


def _address(ranks: Ranks, launcher: _Launcher, environment: Mapping[str, str]) -> str:
    if _is_one_machine(launcher, environment):
        return DEFAULT_ADDRESS
    if launcher is _SRUN and (nodes := environment.get("SLURM_STEP_NODELIST", environment.get("SLURM_NODELIST"))):
        return first_node(nodes)
    raise BadInput(
        f"environment: MASTER_ADDR is not set, and the {ranks.world_size} ranks of {ranks.source} are not all on this "
        "machine; set MASTER_ADDR to the address of rank 0's machine"
    )


def _choose_interface(launcher: _Launcher, environment: MutableMapping[str, str]) -> None:
    """Make Gloo listen where the other machines reach it.

    By default Gloo listens on the address of this machine's host name, which on many systems is a loopback address
    (127.0.1.1 in /etc/hosts). NCCL chooses its own interface, InfiniBand first.
    """
    others: list[Iterable[str]] = [[environment["MASTER_ADDR"]]]
    if launcher is _SRUN and (nodes := environment.get("SLURM_STEP_NODELIST", environment.get("SLURM_NODELIST"))):
        # Expanded only as far as needed: a job may have thousands of nodes.
        others.insert(0, (node for node in expand_nodes(nodes) if node != environment.get("SLURMD_NODENAME")))
    interface = interface_towards(chain.from_iterable(others))
    if interface is not None:
        environment[INTERFACE] = interface


def first_node(nodes: str) -> str:
    """The first host of a Slurm node list: `gpu03` for `gpu[03-07,12],login`."""
    return next(expand_nodes(nodes))


def rank_environment(base: Mapping[str, str], index: int, processes: int, port: int) -> dict[str, str]:
    """The environment of rank `index`: `base`, its place in the job, and settings for this machine."""
    environment = dict(base)
    environment.update(
        RANK=str(index),
        LOCAL_RANK=str(index),
        WORLD_SIZE=str(processes),
        LOCAL_WORLD_SIZE=str(processes),
        MASTER_ADDR=DEFAULT_ADDRESS,
        MASTER_PORT=str(port),
    )
    cores = len(os.sched_getaffinity(0))
    environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))
    if not has_gpu(base):
        environment.setdefault("DS_ACCELERATOR", "cpu")
    # DeepSpeed calls ninja, which is next to Python in the virtual environment; that may not be activated.
    environment["PATH"] = os.pathsep.join([*filter(None, [base.get("PATH")]), str(Path(sys.executable).parent)])
    return environment


def has_gpu(environment: Mapping[str, str]) -> bool:
    """Whether torch may find a GPU, as far as can be known without importing torch."""
    if environment.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return False
    return any(Path(file).exists() for file in DEVICE_FILES)
