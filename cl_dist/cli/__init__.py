"""`cl-dist`: commands that parse, delegate and print. Heavy modules are imported by the command that needs them, and
nothing at all with this one, so that Ctrl-C is understood from the first moment.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn


def program() -> NoReturn:
    """Be the program `cl-dist`: run the command that its arguments name and end the process with its exit code."""
    with _ending_at_ctrl_c():
        import cl_dist.cli.parser  # noqa: F401 - all commands, which takes the longest
        from cl_dist.output import fill_missing_descriptors
        from cl_dist.process_end import end_with
    fill_missing_descriptors()
    end_with(main)


@contextmanager
def _ending_at_ctrl_c() -> Iterator[None]:
    """While the modules are imported, where Python would print a traceback; SIGINT stays ignored where it is (`&`)."""

    def end(number: int, frame: FrameType | None) -> None:
        try:
            os.write(2, b"cl-dist: interrupted: stopped before anything was started\n")
        finally:
            os._exit(75)  # as `errors.Interrupted`, which may not be imported yet

    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, end)
    yield
    signal.signal(signal.SIGINT, signal.default_int_handler)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    0 done, 2 bad input, 75 interrupted and resumable, 76 another rank was lost (of ranks that cl-dist did not start
    itself), 1 anything else.
    """
    from argparse import Namespace
    from contextlib import nullcontext

    from cl_dist.cli.failures import guarded
    from cl_dist.cli.parser import parse
    from cl_dist.launch.child import die_with_launcher
    from cl_dist.launch.environment import is_rank
    from cl_dist.output import HASTE_SECONDS, PATIENCE_SECONDS, direct_output, steady_output

    die_with_launcher(os.environ)
    arguments = list(sys.argv[1:] if argv is None else argv)
    with direct_output():
        try:
            parsed = parse(arguments)
        except SystemExit as end:  # argparse has said what is wrong, or printed its help
            code = int(end.code or 0)
            return guarded(Namespace(command=lambda _: code, debug=False))
        # A command that works must not end because nobody reads what it prints.
        patience = HASTE_SECONDS if is_rank(os.environ) else PATIENCE_SECONDS
        with steady_output(patience) if parsed.works(parsed) else nullcontext():
            return guarded(parsed)
