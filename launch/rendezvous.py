"""Where the ranks of a job meet: a port of the first machine. `program` prints a free one, for the batch script.

A port is derived from the job, so that jobs on one machine look in different places first, and then tried, so that
none is taken that somebody else listens on.
"""

from __future__ import annotations

import os
import socket
import zlib
from collections.abc import Mapping

FIRST_PORT = 20000
"""Ports are picked from this one up, below Linux's range for outgoing connections (32768)."""
PORTS = 10000
_JOB = ("SLURM_JOB_ID", "SLURM_STEP_ID", "PMIX_NAMESPACE", "PMI_PORT")


def derived_port(job: str) -> int:
    """A port that all ranks of a job derive alike, and other jobs most likely otherwise."""
    return FIRST_PORT + zlib.crc32(job.encode()) % PORTS


def free_port(job: str) -> int:
    """The first port from `derived_port` on that nobody listens on; the derived one where all are taken."""
    start = derived_port(job) - FIRST_PORT
    candidates = (FIRST_PORT + (start + offset) % PORTS for offset in range(PORTS))
    return next(filter(_is_free, candidates), FIRST_PORT + start)


def job_name(environment: Mapping[str, str]) -> str:
    """What tells this job, or this step of one, from others on the machine."""
    return ".".join(environment.get(name, "") for name in _JOB)


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        # As torch's store does: connections of a job that has just ended must not hide the port.
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
