"""`cl-dist`: commands that parse, delegate and print. Each command imports the heavy modules that it needs, and this
module imports none, so that Ctrl-C is handled from the very start.
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
    """Entry point of `cl-dist`: run the command in sys.argv and exit with its code."""
    # Where SIGCHLD is ignored, as in a notebook's %%bash, the kernel forgets how child processes have ended.
    if signal.getsignal(signal.SIGCHLD) == signal.SIG_IGN:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    with _exit_on_ctrl_c():
        from cl_dist.cli.parser import import_command
        from cl_dist.output import fill_missing_descriptors
        from cl_dist.process_end import end_with

        import_command(sys.argv[1:])  # takes longest
    fill_missing_descriptors()
    end_with(main)


@contextmanager
def _exit_on_ctrl_c() -> Iterator[None]:
    """Exit on SIGINT during imports, where Python would print a traceback. An ignored SIGINT (`&`) stays ignored."""

    def end(number: int, frame: FrameType | None) -> None:
        try:
            os.write(2, b"cl-dist: interrupted: stopped before anything was started\n")
        finally:
            os._exit(75)  # the code of `errors.Interrupted`, which may not be imported yet

    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, end)
    yield
    signal.signal(signal.SIGINT, signal.default_int_handler)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    0 success, 2 bad input, 75 interrupted and resumable, 76 another rank was lost (only if another launcher started the
    ranks), 1 any other failure.
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
    with direct_output():  # from here on, a closed or full standard output is handled
        try:
            parsed = parse(arguments)
        except SystemExit as end:  # argparse has printed an error or its help
            code = int(end.code or 0)
            return guarded(Namespace(command=lambda _: code, debug=False))
        # A command that does work must not end because nobody reads its output.
        patience = HASTE_SECONDS if is_rank(os.environ) else PATIENCE_SECONDS
        with steady_output(patience) if parsed.works(parsed) else nullcontext():
            return guarded(parsed)
