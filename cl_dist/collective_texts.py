"""What the errors of collective operations mean, which only their wording says: Gloo's, NCCL's and the rendezvous's.

A rank sees them as exceptions, its launcher as the last lines of a rank that a library has aborted. Sources: PyTorch's
`ProcessGroupNCCL.cpp`, `NCCLUtils.cpp` and `socket.cpp`, NCCL's `socket.cc`, `net_ib` and `ncclGetErrorString`, Gloo's
`transport/tcp`.
"""

from __future__ import annotations

import re
from typing import Literal

Meaning = Literal["lost", "timed out", "shared memory"]

_SHARED_MEMORY = ("shared memory segment", "failed to extend /dev/shm")
"""NCCL's buffers between the ranks of a machine do not fit into /dev/shm."""
_LOCAL = ("no socket interface found", "too many open files", "address already in use", "cannot allocate memory")
"""NCCL calls these system errors too, but their cause is this machine, and not another rank."""
_TIMED_OUT = ("timed out", "timeout")
_IN_PASSING = re.compile(
    r"^.*\bnccl info\b.*$|timeout\(ms\)=\d+|either an error or timeout|have failed or timed out", re.MULTILINE
)
"""What torch's watchdog of NCCL prints with every error, and NCCL's log, which names settings such as
NCCL_IB_TIMEOUT and reports connections that are closed in order."""
_LOST = (
    # sockets: Gloo, NCCL and torch's store
    "connection closed by",
    "connection reset by peer",
    "connection refused",
    "connection timed out",
    "connection was likely closed",
    "software caused connection abort",
    "broken pipe",
    "socket closed",
    "socket unexpectedly closed",
    "peer closed the connection",
    "no route to host",
    "network is unreachable",
    "host is unreachable",
    # NCCL
    "ncclremoteerror",
    "ncclsystemerror",
    "remote process exited or there was a network error",
    "got completion from peer",
    "socket recv failed while polling",
    "nccl communicator was aborted",
)
"""All compared in lower case."""
_LAST_ERROR = "Last error:"
_MOST_CHARACTERS = 300


def meaning(text: str) -> Meaning | None:
    """What an error of a collective operation means: another rank is gone or unreachable, or made this one wait for too
    long, or /dev/shm is too small; None if it is something else.
    """
    lower = _IN_PASSING.sub("", text.lower())
    if any(sign in lower for sign in _SHARED_MEMORY):
        return "shared memory"
    if any(sign in lower for sign in _LOCAL):
        return None
    # "Connection timed out" is a network that lost a machine; every other timeout is that of the operation.
    if "connection timed out" not in lower and any(sign in lower for sign in _TIMED_OUT):
        return "timed out"
    return "lost" if any(sign in lower for sign in _LOST) else None


def is_collective(text: str) -> bool:
    """Whether the text comes from Gloo or NCCL. Gloo's errors have no class, but name its source files."""
    return "gloo" in text.lower() or "nccl" in text.lower()


def nccl_detail(text: str) -> str | None:
    """The line in which NCCL, or torch's watchdog of NCCL, says what happened; None if there is none."""
    lines = [line.strip() for line in text.splitlines()]
    for number, line in enumerate(lines):
        if line.startswith(_LAST_ERROR):
            found = line.removeprefix(_LAST_ERROR).strip() or next(filter(None, lines[number + 1 :]), "")
            if found:
                return found[:_MOST_CHARACTERS]
    signs = ("collective operation timeout", "nccl error", "nccl communicator was aborted", "nccl warn")
    said = next((line for line in lines if any(sign in line.lower() for sign in signs)), None)
    return None if said is None else said[-_MOST_CHARACTERS:]
