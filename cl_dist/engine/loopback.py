"""Where the ranks meet: a store, which on one machine listens on the loopback interface only.

torch's own rendezvous (`env://`) listens on all interfaces, whatever address it is given, and admits anyone who can
reach it. But it accepts a socket that is already listening, and that socket decides who can connect.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from ipaddress import ip_address
from typing import Any

from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import register_rendezvous_handler, rendezvous

from cl_dist.errors import ClDistError

SCHEME = "cl-dist"
LOOPBACK = "127.0.0.1"
_BACKLOG = 4096

Agree = Callable[[Any, int, int, timedelta], None]

_agree: Agree
"""What the ranks agree on before they meet; torch calls `_meet` without a way to pass it on."""


def init_method(agree: Agree) -> str:
    """Register how the ranks meet, and return it as torch's `init_method`.

    Args:
        agree: Called on every rank with the store, rank, world size and timeout, before anything else uses the store.
    """
    global _agree
    _agree = agree
    with suppress(RuntimeError):  # already registered
        register_rendezvous_handler(SCHEME, _meet)
    return f"{SCHEME}://"


def _meet(url: str, timeout: timedelta, **_: Any) -> Iterator[tuple[Any, int, int]]:
    """Implement torch's rendezvous protocol: yield store, rank and world size."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if serves_loopback():
        store = _loopback_store(rank, world, timeout)
    else:
        store = next(rendezvous("env://", rank, world, timeout=timeout))[0]
    _agree(store, rank, world, timeout)
    yield store, rank, world
    # torch asks again after losing a rank, which none of our launchers replaces.
    raise RuntimeError("the ranks meet once")


def serves_loopback() -> bool:
    """Whether the store is this module's: on one machine, except under torchrun, which serves one itself (on all
    interfaces). Otherwise it is that of torch's `env://`.
    """
    served_by_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return not served_by_launcher and is_loopback(os.environ.get("MASTER_ADDR", ""))


def is_loopback(address: str) -> bool:
    """Whether only this machine can reach an address."""
    if address == "localhost":
        return True
    try:
        return ip_address(address).is_loopback
    except ValueError:  # a host name
        return False


def _loopback_store(rank: int, world: int, timeout: timedelta) -> TCPStore:
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    address = LOOPBACK if address == "localhost" else address
    listener = _listen(address, port) if rank == 0 else None
    return TCPStore(address, port, world, is_master=rank == 0, timeout=timeout, master_listen_fd=listener)


def _listen(address: str, port: int) -> int:
    """Open a listening socket and return its descriptor; torch closes it."""
    listener = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    # As torch does: connections of a job that has just ended must not block the port.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((address, port))
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        code = "EADDRINUSE: " if "in use" in str(error) else ""
        raise ClDistError(f"the ranks cannot meet at {address}:{port}: {code}{error.strerror}") from error
    return listener.detach()
