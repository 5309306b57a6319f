"""Where the ranks of a job meet: the nodes of the job, the network interface towards them, and a free port.

The port is derived from the job's id, so that jobs on one machine start looking in different places, and then probed,
so that no port is chosen that another program listens on. `program` prints a free port for the batch script.
"""

from __future__ import annotations

import fcntl
import os
import re
import socket
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping

DEFAULT_ADDRESS = "127.0.0.1"
"""Where ranks on a single machine meet."""
FIRST_PORT = 20000
"""Lowest port that is chosen. The range ends below Linux's range for outgoing connections (32768)."""
PORTS = 10000
"""Number of ports to choose from."""
_JOB = ("SLURM_JOB_ID", "SLURM_STEP_ID", "PMIX_NAMESPACE", "PMI_PORT")
_SIOCGIFADDR = 0x8915
"""Linux's request for an interface's IPv4 address (netdevice(7))."""
_NAME_BYTES = 15
"""Longest name of an interface."""
_DISCARD_PORT = 9
_PART = re.compile(r"[^,\[\]]+|\[[^\[\]]*\]|,")


def expand_nodes(nodes: str) -> Iterator[str]:
    """Expand a Slurm node list, keeping its order: `gpu[03-04,12],login` is gpu03, gpu04, gpu12 and login."""
    group: list[str] = []
    for part in [*_PART.findall(nodes), ","]:  # the last comma ends the last name
        if part != ",":
            group.append(part)
        elif group:
            yield from _combine(group)
            group = []


def _combine(parts: list[str]) -> Iterator[str]:
    """Every name that the parts form when joined; a part in brackets has several alternatives."""
    if not parts:
        yield ""
        return
    for begin in _texts(parts[0]):
        for rest in _combine(parts[1:]):
            yield begin + rest


def _texts(part: str) -> Iterator[str]:
    if not part.startswith("["):
        yield part
        return
    for piece in part[1:-1].split(","):
        first, dash, last = piece.partition("-")
        if not dash:
            yield first
            continue
        for number in range(int(first), int(last) + 1):
            yield f"{number:0{len(first)}d}"  # 08-10 is 08, 09 and 10


def address_towards(host: str) -> str | None:
    """This machine's IPv4 address on the route to `host`; None if the host is unknown or the route is the loopback."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, _DISCARD_PORT))  # UDP: picks a route and sends nothing
            address: str = probe.getsockname()[0]
    except OSError:
        return None
    return None if address.startswith("127.") else address


def interface_towards(hosts: Iterable[str]) -> str | None:
    """The network interface that leads to the first of `hosts` with a known route; None if no host has one."""
    for host in hosts:
        address = address_towards(host)
        if address is not None:
            return interface_of(address)
    return None


def interface_of(address: str) -> str | None:
    """The network interface with this IPv4 address; None if no interface has it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()[:_NAME_BYTES]))
            except OSError:  # the interface has no IPv4 address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None


def derived_port(job: str) -> int:
    """A port that is the same on all ranks of a job and most likely differs between jobs."""
    return FIRST_PORT + zlib.crc32(job.encode()) % PORTS


def free_port(job: str) -> int:
    """The first free port, starting at `derived_port` and wrapping around; the derived port if all are taken."""
    start = derived_port(job) - FIRST_PORT
    candidates = (FIRST_PORT + (start + offset) % PORTS for offset in range(PORTS))
    return next(filter(_is_free, candidates), FIRST_PORT + start)


def find_free_port() -> int:
    """A TCP port that is free at the moment."""
    with socket.socket() as probe:
        probe.bind((DEFAULT_ADDRESS, 0))
        port: int = probe.getsockname()[1]
        return port


def job_name(environment: Mapping[str, str]) -> str:
    """Identifies this job, or this step of a job, among the jobs on the machine."""
    return ".".join(environment.get(name, "") for name in _JOB)


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        # Like torch's store: the port counts as free although connections of a job that just ended linger.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
        return True


def program() -> None:
    """Print a free port for this job."""
    print(free_port(job_name(os.environ)))  # noqa: T201 - the batch script reads it


if __name__ == "__main__":
    program()
