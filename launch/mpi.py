"""Ranks that MPI started learn from MPI itself who they are and where they meet, where mpi4py is installed.

MPI is used for that moment only: it is finalised before training begins, because a rank that fails later would wait in
its finalisation for the others. Collectives are NCCL's or Gloo's.
"""

from __future__ import annotations

import socket
from collections.abc import MutableMapping
from dataclasses import replace
from typing import Any

from cl_dist.launch.environment import DEFAULT_ADDRESS, MPI_SOURCES, Ranks
from cl_dist.launch.hosts import address_towards
from cl_dist.launch.rendezvous import free_port, job_name


def ask_mpi(ranks: Ranks, environment: MutableMapping[str, str]) -> Ranks:
    """Rank, number of ranks and local rank as MPI has them; sets MASTER_ADDR and MASTER_PORT where they are not set.

    Returns `ranks` as they are where another launcher made them, where mpi4py is not installed or finds no MPI
    library, and where its library is not the one of the launcher (then it sees a world of one).
    """
    if ranks.source not in MPI_SOURCES:
        return ranks
    mpi = _import_mpi()
    if mpi is None:
        return ranks
    began = not mpi.Is_initialized()
    if began:
        mpi.Init()
    try:
        return _meet(mpi, ranks, environment)
    finally:
        if began:
            mpi.Finalize()


def _import_mpi() -> Any:
    """mpi4py's MPI module, not yet initialised; None where it cannot be used."""
    try:
        import mpi4py

        mpi4py.rc.initialize = mpi4py.rc.finalize = False
        from mpi4py import MPI
    except (ImportError, RuntimeError):  # not installed; or no MPI library of its kind to load
        return None
    return MPI


def _meet(mpi: Any, ranks: Ranks, environment: MutableMapping[str, str]) -> Ranks:
    world = mpi.COMM_WORLD
    if world.Get_size() != ranks.world_size:
        return ranks
    machine = world.Split_type(mpi.COMM_TYPE_SHARED)
    address, port = world.bcast(_meeting_point(world, machine, environment), root=0)
    for name, value in (("MASTER_ADDR", address), ("MASTER_PORT", str(port))):
        environment[name] = environment.get(name) or value
    return replace(ranks, rank=world.Get_rank(), local_rank=machine.Get_rank())


def _meeting_point(world: Any, machine: Any, environment: MutableMapping[str, str]) -> tuple[str, int] | None:
    """Rank 0's address as the others reach it, and a free port there; None on the other ranks."""
    hosts = world.gather(socket.gethostname(), root=0)
    if hosts is None:
        return None
    port = free_port(job_name(environment))
    if machine.Get_size() == world.Get_size():
        return DEFAULT_ADDRESS, port
    others = (address_towards(host) for host in dict.fromkeys(hosts) if host != hosts[0])
    return next(filter(None, others), hosts[0]), port
