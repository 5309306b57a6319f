"""How a command's failure is told: a sentence and an exit code, on one rank."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from argparse import Namespace
from contextlib import suppress

from cl_dist.config.words import show_path
from cl_dist.errors import BadInput, ClDistError, Interrupted, JobFailed, RankLost
from cl_dist.launch.child import report_failure
from cl_dist.launch.environment import find_ranks
from cl_dist.output import drain_output

UNUSABLE_PATH = (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR)
"""What the system says of a path that cannot be, whatever the machine's state."""
SIGNALLED = 128
"""Exit codes above it are this plus the signal that ended a process."""


def guarded(arguments: Namespace) -> int:
    """Run the parsed command; turn whatever it raises into a message and an exit code."""
    try:
        code = int(arguments.command(arguments))
        sys.stdout.flush()  # here, where output that is lost is understood, rather than when Python exits
        return code
    except ClDistError as error:
        return _end(error.exit_code, str(error), arguments.debug, whole_job=isinstance(error, JobFailed))
    except KeyboardInterrupt:
        return _end(Interrupted.exit_code, "stopped before anything was started", arguments.debug)
    except Exception as error:  # a bug, here or in a library
        if isinstance(error, OSError) and error.filename is not None and error.errno in UNUSABLE_PATH:
            return _end(BadInput.exit_code, f"{show_path(error.filename)}: {error.strerror}", arguments.debug)
        summary = " ".join(str(error).split())
        message = f"internal error: {type(error).__name__}: {summary} (run again with --debug for the traceback)"
        return _end(1, message, arguments.debug)


def tell(exit_code: int, message: str, whole_job: bool = False) -> None:
    """Print a failure's sentence, or several, to standard error; which rank it is, unless it is about the job."""
    kind = "interrupted" if exit_code == Interrupted.exit_code or exit_code > SIGNALLED else "error"
    prefix = "" if whole_job else _rank_prefix()
    for line in message.splitlines():
        print(f"cl-dist: {kind}: {prefix}{line}", file=sys.stderr, flush=True)


def end_now(message: str, speaks: bool) -> None:
    """End this process, whatever its main thread is doing, with `RankLost`'s exit code.

    `speaks`: this is the rank to print the job's message.
    """
    if not report_failure(os.environ, RankLost.exit_code, message, whole_job=True) and speaks:
        tell(RankLost.exit_code, message, whole_job=True)
    drain_output()
    os._exit(RankLost.exit_code)


def _end(exit_code: int, message: str, debug: bool, whole_job: bool = False) -> int:
    if debug:
        traceback.print_exc()
    if not report_failure(os.environ, exit_code, message, whole_job):
        tell(exit_code, message, whole_job)
    return exit_code


def _rank_prefix() -> str:
    """Who speaks, on the ranks of a foreign launcher other than 0."""
    with suppress(BadInput):
        ranks = find_ranks(os.environ)
        if ranks is not None and ranks.rank > 0:
            return f"rank {ranks.rank}: "
    return ""
