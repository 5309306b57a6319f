"""From a command to ranks: check everything that can be checked cheaply, then start ranks, or be one."""

from __future__ import annotations

import logging
import os
import signal
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from cl_dist.cli.failures import SIGNALLED, tell
from cl_dist.errors import BadInput, ClDistError, Interrupted
from cl_dist.launch.child import PROGRAM, is_launched, python_command, terminal
from cl_dist.launch.environment import Ranks, export_ranks, find_ranks
from cl_dist.launch.local import check_processes, launch
from cl_dist.launch.mpi import ask_mpi
from cl_dist.output import drain_output, lost_output
from cl_dist.progress import Reporter, make_reporter
from cl_dist.stop_requests import heeded

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


def run_on_ranks(
    arguments: Namespace,
    processes: int,
    check: Callable[[bool], None],
    work: Callable[[Reporter], None],
    hang_seconds: float | None,
    note: Callable[[str], None] = lambda text: None,
) -> int:
    """Do `work` on every rank and return the exit code.

    `check(first)` raises BadInput for unusable input; it runs before any rank is started, or on every rank where
    another launcher has started them. `first` is False on ranks that leave the run folder to rank 0. A rank that we
    started and that is stopped (SIGSTOP) for well over `hang_seconds` is killed. Afterwards `note` gets a sentence
    about what was lost of each output stream.
    """
    ranks = find_ranks(os.environ)
    if ranks is None:
        check_processes(processes)
        with notices_left_to_the_run():
            check(True)
        code = _start_ranks(arguments, processes, hang_seconds)
        if code != BadInput.exit_code:  # the run folder may be another run's
            _note_lost_output(note)
        return code
    if not is_launched(os.environ):
        with told_once_per_machine(), notices_left_to_the_run():
            check(ranks.rank == 0)
    return _be_rank(ranks, work, note)


def _note_lost_output(note: Callable[[str], None]) -> None:
    drain_output()  # only then it shows
    for text in lost_output():
        note(text)


@contextmanager
def told_once_per_machine() -> Iterator[None]:
    """Around checks that all ranks do: of the ranks on one machine only the first says what is wrong with the input."""
    try:
        yield
    except BadInput as error:
        ranks = find_ranks(os.environ)
        if ranks is not None and ranks.local_rank > 0 and not is_launched(os.environ):
            raise BadInput("") from error  # an empty message is not printed
        raise


@contextmanager
def told_by_first_rank() -> Iterator[None]:
    """Around what fails on all ranks alike: only rank 0 says it, where our launcher does not print one for all."""
    try:
        yield
    except ClDistError as error:
        ranks = find_ranks(os.environ)
        if ranks is not None and ranks.rank > 0 and not is_launched(os.environ):
            error.args = ("",)  # an empty message is not printed
        raise


def _start_ranks(arguments: Namespace, processes: int, hang_seconds: float | None) -> int:
    command = [*python_command(PROGRAM), *arguments.argv]
    ending = launch(command, processes, os.environ, hang_seconds=hang_seconds)
    for line in ending.output:
        print(line, file=sys.stderr)
    if ending.message is not None:
        tell(ending.exit_code, ending.message)
    return ending.exit_code


def _be_rank(ranks: Ranks, work: Callable[[Reporter], None], note: Callable[[str], None]) -> int:
    ranks = ask_mpi(ranks, os.environ)
    export_ranks(ranks, os.environ)
    reporter = make_reporter(ranks.rank, sys.stdout, terminal(os.environ))
    refused = False
    try:
        with _interruptible():
            work(reporter)
    except BadInput:
        refused = True
        raise
    finally:
        reporter.close()
        if ranks.rank == 0 and not refused:
            _note_lost_output(note)
    return 0


@contextmanager
def notices_left_to_the_run() -> Iterator[None]:
    """The run itself reads the same data again and tells what is worth knowing, once, on rank 0."""
    logger = logging.getLogger("cl_dist")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Until the coordinator listens for signals itself, one that asks to stop ends the rank at once."""

    def stop(number: int, frame: FrameType | None) -> None:
        error = Interrupted("stopped outside of training; what was saved is intact")
        if not is_launched(os.environ):
            # A launcher that is not ours may have sent this because another rank failed. Exit code 75 would make a
            # batch script believe that all ranks have agreed to stop.
            error.exit_code = SIGNALLED + number
        raise error

    before = {number: signal.signal(number, stop) for number in heeded(STOP_SIGNALS)}
    try:
        yield
    except Interrupted:
        # Launchers end the other ranks as soon as the first one has left with an exit code that is not 0. Those are
        # about to leave with the same one, which tells the batch script that all is saved.
        before = dict.fromkeys(STOP_SIGNALS, signal.SIG_IGN)
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
