"""What a rank that `local.launch` started owes its launcher: to die with it, and to say how it failed."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

LAUNCHER_PID = "CL_DIST_LAUNCHER_PID"
FAILURE_FILE = "CL_DIST_FAILURE_FILE"
TERMINAL = "CL_DIST_TERMINAL"
"""A file descriptor of the terminal that shows the first rank's output, which itself is a pipe."""
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Failure:
    """How a rank ended, in its own words."""

    exit_code: int
    message: str
    time: float
    """Seconds since the epoch: the rank that failed first is the one to blame, the others lost their peer."""
    whole_job: bool = False
    """Whether the message is about the job and names ranks itself, whoever tells it."""


def is_launched(environment: Mapping[str, str]) -> bool:
    """Whether `local.launch` started this process."""
    return LAUNCHER_PID in environment


def terminal(environment: Mapping[str, str]) -> int | None:
    """A file descriptor of the terminal that the launcher prints this rank's output to; None where there is none."""
    return int(environment[TERMINAL]) if is_launched(environment) and TERMINAL in environment else None


def die_with_launcher(environment: Mapping[str, str]) -> None:
    """Have the kernel kill this process when its launcher dies, however it dies. Does nothing outside Linux."""
    if not is_launched(environment):
        return
    try:
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    except AttributeError:  # no prctl here
        return
    if os.getppid() != int(environment[LAUNCHER_PID]):  # it died before the line above
        os.kill(os.getpid(), signal.SIGKILL)


def report_failure(environment: Mapping[str, str], exit_code: int, message: str, whole_job: bool = False) -> bool:
    """Leave `message` for the launcher, which prints one for all ranks; False where no launcher waits for it."""
    if FAILURE_FILE not in environment:
        return False
    path = Path(environment[FAILURE_FILE])
    unfinished = path.with_suffix(".part")
    try:
        unfinished.write_text(json.dumps(asdict(Failure(exit_code, message, time.time(), whole_job))), encoding="utf-8")
        unfinished.replace(path)
    except OSError:  # the disk is full: the rank tells it itself
        return False
    return True


def read_failure(path: Path) -> Failure | None:
    """What a rank left, if anything."""
    try:
        return Failure(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
