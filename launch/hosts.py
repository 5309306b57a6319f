"""Machines of a job: Slurm's short form of their names, and which network interface leads to them."""

from __future__ import annotations

import fcntl
import re
import socket
import struct
from collections.abc import Iterable, Iterator

_SIOCGIFADDR = 0x8915
"""Linux's request for an interface's IPv4 address (netdevice(7))."""
_NAME_BYTES = 15
_DISCARD_PORT = 9
_PART = re.compile(r"[^,\[\]]+|\[[^\[\]]*\]|,")


def expand_nodes(nodes: str) -> Iterator[str]:
    """The hosts of Slurm's short form, in its order: `gpu[03-04,12],login` is gpu03, gpu04, gpu12 and login."""
    group: list[str] = []
    for part in [*_PART.findall(nodes), ","]:
        if part != ",":
            group.append(part)
        elif group:
            yield from _combine(group)
            group = []


def _combine(parts: list[str]) -> Iterator[str]:
    """Every name that consecutive parts make; a part in brackets stands for several texts."""
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
    """This machine's IPv4 address on the way to `host`; None where that is unknown or the loopback's."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, _DISCARD_PORT))  # chooses a route, sends nothing
            address: str = probe.getsockname()[0]
    except OSError:
        return None
    return None if address.startswith("127.") else address


def interface_towards(hosts: Iterable[str]) -> str | None:
    """The network interface that leads to the first of `hosts` that can be told; None where none can."""
    for host in hosts:
        address = address_towards(host)
        if address is not None:
            return interface_of(address)
    return None


def interface_of(address: str) -> str | None:
    """The network interface that has an IPv4 address; None where none has."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()[:_NAME_BYTES]))
            except OSError:  # it has no IPv4 address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None
