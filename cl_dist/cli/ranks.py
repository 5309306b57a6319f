"""From a command to ranks: run all cheap checks, then start the ranks, or be one of them."""

from __future__ import annotations

import logging
import os
import signal
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType

from cl_dist.cli.failures import SIGNALLED, print_failure, stop_now
from cl_dist.config.schema import Recipe
from cl_dist.errors import BadInput, ClDistError, Interrupted
from cl_dist.launch.child import PROGRAM, is_launched, python_command, terminal
from cl_dist.launch.environment import Ranks, export_ranks, find_ranks
from cl_dist.launch.local import check_processes, launch
from cl_dist.launch.mpi import ask_mpi
from cl_dist.machine import check_device, count_ranks
from cl_dist.output import drain_output, lost_output
from cl_dist.progress import LineReporter, Reporter, UnfailingReporter, count, make_reporter
from cl_dist.stop_requests import heeded, is_importing

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


def with_ranks(recipe: Recipe) -> Recipe:
    """The recipe with the number of ranks in place of `launch.processes: auto`.

    Raises BadInput if this process is to start ranks on GPUs that cannot be used (`launch.device: cuda`).
    """
    ranks, launch_settings = find_ranks(os.environ), recipe.launch
    if ranks is None:
        check_device(launch_settings.device, os.environ)
    if launch_settings.processes != "auto":
        return recipe
    number = count_ranks(launch_settings.device, os.environ) if ranks is None else ranks.world_size
    return replace(recipe, launch=replace(launch_settings, processes=number))


def number_of_ranks(recipe: Recipe) -> int:
    """How many ranks train together: those of another launcher, or those that `launch.processes` asks for."""
    ranks, processes = find_ranks(os.environ), recipe.launch.processes
    if ranks is not None:
        return ranks.world_size
    assert processes != "auto", "`with_ranks` comes first"
    return processes


def run_on_ranks(
    arguments: Namespace,
    processes: int,
    check: Callable[[bool], None],
    work: Callable[[Reporter], None],
    hang_seconds: float | None,
    note: Callable[[str], None] = lambda text: None,
) -> int:
    """Run `work` on every rank and return the exit code.

    Args:
        arguments: The parsed command line.
        processes: Number of ranks to start, unless another launcher has started them.
        check: Raises BadInput for unusable input. It runs before any rank is started, or on every rank if another
            launcher started them. Its argument is False on ranks that leave the run folder to rank 0.
        work: What each rank does.
        hang_seconds: A rank started here that is stopped (SIGSTOP) for well over this time is killed.
        note: Called at the end with a sentence about each output stream that lost output.
    """
    ranks = find_ranks(os.environ)
    if ranks is None:
        check_processes(processes)
        # Plain lines: the checks themselves may print.
        reporter = UnfailingReporter(LineReporter(sys.stdout), sys.stdout)
        try:
            reporter.phase("checking data and model")
            with without_notices():
                check(True)
            reporter.message(f"starting {count(processes, 'rank')}")
        finally:
            reporter.close()
        ending = launch([*python_command(PROGRAM), *arguments.argv], processes, os.environ, hang_seconds=hang_seconds)
        for line in ending.output:
            print(line, file=sys.stderr)
        if ending.message is not None:
            print_failure(ending.exit_code, ending.message)
        if ending.exit_code != BadInput.exit_code:  # otherwise the run folder may belong to another run
            _note_lost_output(note)
        return ending.exit_code
    if not is_launched(os.environ):
        with reported_once_per_machine(), without_notices():
            check(ranks.rank == 0)
    return _be_rank(ranks, work, note)


def _note_lost_output(note: Callable[[str], None]) -> None:
    drain_output()  # only then is the loss known
    for text in lost_output():
        note(text)


@contextmanager
def reported_once_per_machine() -> Iterator[None]:
    """Context of checks that all ranks run: on each machine, only the first rank reports bad input."""
    try:
        yield
    except BadInput as error:
        ranks = find_ranks(os.environ)
        if ranks is not None and ranks.local_rank > 0 and not is_launched(os.environ):
            raise BadInput("") from error  # an empty message is not printed
        raise


@contextmanager
def reported_by_first_rank() -> Iterator[None]:
    """Context of work that fails on all ranks alike: only rank 0 reports it, unless our launcher does so for all."""
    try:
        yield
    except ClDistError as error:
        ranks = find_ranks(os.environ)
        if ranks is not None and ranks.rank > 0 and not is_launched(os.environ):
            error.args = ("",)  # an empty message is not printed
        raise


def _be_rank(ranks: Ranks, work: Callable[[Reporter], None], note: Callable[[str], None]) -> int:
    # MPI knows best; without mpi4py, the launcher's variables have to do.
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
def without_notices() -> Iterator[None]:
    """Context of checks that read the data: the run reads it again, and only then rank 0 logs its notices."""
    logger = logging.getLogger("cl_dist")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Until the coordinator handles signals itself, a request to stop ends the rank at once."""
    asked: list[Interrupted] = []

    def stop(number: int, frame: FrameType | None) -> None:
        error = Interrupted("stopped outside of training; the saved state is intact")
        if not is_launched(os.environ):
            # Another launcher may have sent this because a rank failed. With exit code 75, a batch script would take it
            # for an agreement of all ranks to stop.
            error.exit_code = SIGNALLED + number
        if is_importing():
            stop_now(error)
        asked.append(error)
        raise error

    before = {number: signal.signal(number, stop) for number in heeded(STOP_SIGNALS)}
    try:
        try:
            yield
        except ClDistError:
            raise
        except Exception as error:  # a library, in the middle of an import for example, has wrapped ours
            if asked:
                raise asked[0] from error
            raise
    except Interrupted:
        # Launchers end the other ranks as soon as the first one exits with a nonzero code. Ignore that signal: these
        # ranks are about to exit with 75 too, which tells the batch script that everything is saved.
        before = dict.fromkeys(STOP_SIGNALS, signal.SIG_IGN)
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
