"""Asks MPI for the rank, the world size and the meeting point of ranks that MPI started, if mpi4py is installed.

MPI is used for this only and finalised before training begins: a rank that fails later would wait for the others in
MPI_Finalize. Collectives run on NCCL or Gloo.
"""

from __future__ import annotations

import socket
from collections.abc import MutableMapping
from dataclasses import replace
from typing import Any

from cl_dist.launch.environment import MPI_SOURCES, Ranks
from cl_dist.launch.rendezvous import DEFAULT_ADDRESS, address_towards, free_port, job_name


def ask_mpi(ranks: Ranks, environment: MutableMapping[str, str]) -> Ranks:
    """Rank, world size and local rank according to MPI; also sets MASTER_ADDR and MASTER_PORT unless they are set.

    Returns `ranks` unchanged if another launcher started them, if mpi4py is not installed or finds no MPI library, or
    if that library is not the launcher's (then it sees a world of size one).
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
    """mpi4py's MPI module, not initialised yet; None if it cannot be used."""
    try:
        import mpi4py

        # By default mpi4py initialises MPI on import and finalises it at exit.
        mpi4py.rc.initialize = mpi4py.rc.finalize = False
        from mpi4py import MPI
    except (ImportError, RuntimeError):  # not installed, or no matching MPI library to load
        return None
    return MPI


def _meet(mpi: Any, ranks: Ranks, environment: MutableMapping[str, str]) -> Ranks:
    world = mpi.COMM_WORLD
    if world.Get_size() != ranks.world_size:  # not the launcher's MPI library
        return ranks
    machine = world.Split_type(mpi.COMM_TYPE_SHARED)
    address, port = world.bcast(_meeting_point(world, machine, environment), root=0)
    for name, value in (("MASTER_ADDR", address), ("MASTER_PORT", str(port))):
        environment[name] = environment.get(name) or value
    return replace(ranks, rank=world.Get_rank(), local_rank=machine.Get_rank())


def _meeting_point(world: Any, machine: Any, environment: MutableMapping[str, str]) -> tuple[str, int] | None:
    """An address at which the others reach rank 0, and a free port there; None on the other ranks."""
    hosts = world.gather(socket.gethostname(), root=0)
    if hosts is None:
        return None
    port = free_port(job_name(environment))
    if machine.Get_size() == world.Get_size():
        return DEFAULT_ADDRESS, port
    # The interface on the route to another machine is one that this machine is reachable on.
    others = (address_towards(host) for host in dict.fromkeys(hosts) if host != hosts[0])
    return next(filter(None, others), hosts[0]), port
