"""Reports the failure of a command: a message and an exit code, on one rank."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from argparse import Namespace
from contextlib import suppress
from typing import NoReturn

from cl_dist.config.plugins import own_fault
from cl_dist.config.words import show_path
from cl_dist.errors import BadInput, ClDistError, Interrupted, JobFailed, RankLost
from cl_dist.launch.child import report_failure
from cl_dist.launch.environment import find_ranks
from cl_dist.output import drain_output

UNUSABLE_PATH = (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR)
"""Errors of a path that can never work, whatever the state of the machine."""
SIGNALLED = 128
"""Exit code of a process that was ended by signal N: this plus N."""


def guarded(arguments: Namespace) -> int:
    """Run the parsed command; turn any exception into a message and an exit code."""
    try:
        code = int(arguments.command(arguments))
        sys.stdout.flush()  # raises OutputLost here rather than when Python exits
        return code
    except ClDistError as error:
        return _end(error.exit_code, str(error), arguments.debug, whole_job=isinstance(error, JobFailed))
    except KeyboardInterrupt:
        return _end(Interrupted.exit_code, "stopped before anything was started", arguments.debug)
    except (Exception, SystemExit) as error:  # a bug, here, in a library, or in a plugin
        fault = own_fault(error)
        if fault is not None:
            return _end(1, f"{fault} (run again with --debug for the traceback)", arguments.debug)
        if isinstance(error, SystemExit):
            raise
        if isinstance(error, OSError) and error.filename is not None and error.errno in UNUSABLE_PATH:
            return _end(BadInput.exit_code, f"{show_path(error.filename)}: {error.strerror}", arguments.debug)
        summary = " ".join(str(error).split())
        message = f"internal error: {type(error).__name__}: {summary} (run again with --debug for the traceback)"
        return _end(1, message, arguments.debug)


def print_failure(exit_code: int, message: str, whole_job: bool = False) -> None:
    """Print the lines of a failure message to standard error, with the rank unless the message is about the job."""
    kind = "interrupted" if exit_code == Interrupted.exit_code or exit_code > SIGNALLED else "error"
    prefix = ""
    if not whole_job:
        # Our own launcher adds the rank itself, so this matters for ranks of other launchers.
        with suppress(BadInput):
            ranks = find_ranks(os.environ)
            prefix = f"rank {ranks.rank}: " if ranks is not None and ranks.rank > 0 else ""
    for line in message.splitlines():
        print(f"cl-dist: {kind}: {prefix}{line}", file=sys.stderr, flush=True)


def end_now(message: str, speaks: bool) -> None:
    """Exit at once with `RankLost`'s exit code, whatever the main thread is doing.

    `speaks`: whether this rank prints the job's message.
    """
    if not report_failure(os.environ, RankLost.exit_code, message, whole_job=True) and speaks:
        print_failure(RankLost.exit_code, message, whole_job=True)
    drain_output()
    os._exit(RankLost.exit_code)


def stop_now(request: Interrupted) -> NoReturn:
    """Exit at once because of a request to stop; may be called in a signal's handler."""
    if not report_failure(os.environ, request.exit_code, str(request)):
        with suppress(RuntimeError):  # the handler has interrupted another line that is being printed
            print_failure(request.exit_code, str(request))
            drain_output()
    os._exit(request.exit_code)


def _end(exit_code: int, message: str, debug: bool, whole_job: bool = False) -> int:
    if debug:
        traceback.print_exc()
    if not report_failure(os.environ, exit_code, message, whole_job):
        print_failure(exit_code, message, whole_job)
    return exit_code
