"""Child processes: how this project starts Python, and what a started rank owes its launcher.

A rank dies with its launcher, and leaves a sentence that says how it failed.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import cl_dist

PROGRAM = "cl_dist.cli:program"
"""`cl-dist` itself."""
_HOME = str(Path(cl_dist.__file__).absolute().parents[1])
# `python -m` and `python -c` put the working folder first on the import path, where anyone may have left a `yaml.py`.
# Python 3.11 has a switch against that (`-P`); this does the same on 3.10. PYTHONPATH still counts, except for cl_dist
# itself: a process runs the checkout of the process that started it. The checkout's folder is on the path for this one
# import only, because its top-level folders are named like packages.
BOOTSTRAP = (
    "import sys; sys.path[:1] == [''] and sys.path.pop(0); "
    f"sys.path.insert(0, {_HOME!r}); import cl_dist; sys.path.remove({_HOME!r}); "
    "from importlib import import_module; module, _, function = sys.argv.pop(1).partition(':'); "
    "getattr(import_module(module), function)()"
)
"""Calls the function named by its first argument (`module:function`) and leaves the other arguments in sys.argv."""

LAUNCHER_PID = "CL_DIST_LAUNCHER_PID"
FAILURE_FILE = "CL_DIST_FAILURE_FILE"
TERMINAL = "CL_DIST_TERMINAL"
"""File descriptor of the terminal that shows the first rank's output; the rank's own output is a pipe."""
_PR_SET_PDEATHSIG = 1
# Loaded here, not between fork and exec, where loading a library may deadlock.
_LIBC = ctypes.CDLL(None, use_errno=True)


def python_command(function: str) -> list[str]:
    """The first words of a command that runs `function` (`module:function`) in this interpreter."""
    return [sys.executable, "-c", BOOTSTRAP, function]


def signal_when_parent_dies(number: int) -> None:
    """Ask the kernel to send this process a signal when its parent dies, however it dies. Linux only."""
    with suppress(AttributeError):  # the C library has no prctl
        _LIBC.prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)


@dataclass(frozen=True)
class Failure:
    """How a rank failed, in its own words."""

    exit_code: int
    message: str
    time: float
    """Seconds since the epoch: the rank that failed first is the culprit, the others only lost their peer."""
    whole_job: bool = False
    """Whether the message is about the whole job and names the ranks itself."""


def is_launched(environment: Mapping[str, str]) -> bool:
    """Whether `local.launch` started this process."""
    return LAUNCHER_PID in environment


def terminal(environment: Mapping[str, str]) -> int | None:
    """File descriptor of the terminal that the launcher prints this rank's output to; None without a terminal."""
    return int(environment[TERMINAL]) if is_launched(environment) and TERMINAL in environment else None


def die_with_launcher(environment: Mapping[str, str]) -> None:
    """Have the kernel kill this process when its launcher dies, however it dies. Does nothing outside Linux."""
    if not is_launched(environment):
        return
    signal_when_parent_dies(signal.SIGKILL)
    # The launcher may have died before the line above: then nobody sends that signal.
    if hasattr(_LIBC, "prctl") and os.getppid() != int(environment[LAUNCHER_PID]):
        os.kill(os.getpid(), signal.SIGKILL)


def report_failure(environment: Mapping[str, str], exit_code: int, message: str, whole_job: bool = False) -> bool:
    """Leave `message` for the launcher, which prints one message for all ranks.

    Returns False if no launcher waits for it or it cannot be written; then the rank has to print it itself.
    """
    if FAILURE_FILE not in environment:
        return False
    path = Path(environment[FAILURE_FILE])
    unfinished = path.with_suffix(".part")
    try:
        unfinished.write_text(json.dumps(asdict(Failure(exit_code, message, time.time(), whole_job))), encoding="utf-8")
        unfinished.replace(path)
    except OSError:  # a full disk, say
        return False
    return True


def read_failure(path: Path) -> Failure | None:
    """The failure that a rank reported; None if it reported none."""
    try:
        return Failure(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
