"""`cl-dist`: commands that parse, delegate and print. Heavy modules are imported by the command that needs them."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from contextlib import nullcontext
from typing import NoReturn

from cl_dist.cli.failures import guarded
from cl_dist.cli.parser import parse
from cl_dist.launch.child import die_with_launcher
from cl_dist.launch.environment import is_rank
from cl_dist.output import HASTE_SECONDS, PATIENCE_SECONDS, direct_output, fill_missing_descriptors, steady_output
from cl_dist.process_end import end_with


def program() -> NoReturn:
    """Be the program `cl-dist`: run the command that its arguments name and end the process with its exit code."""
    fill_missing_descriptors()
    end_with(main)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    0 done, 2 bad input, 75 interrupted and resumable, 76 another rank was lost (of ranks that cl-dist did not start
    itself), 1 anything else.
    """
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
