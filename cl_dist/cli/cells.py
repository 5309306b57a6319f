"""Runs the cells of a sweep one after the other, each as a `cl-dist run` in a separate process.

That process has its own session: a Ctrl-C in the terminal reaches only the sweep, which forwards it. If the sweep is
killed, in whatever way, the kernel asks the process to stop.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import IO

from cl_dist.config.load import dump_recipe
from cl_dist.errors import Interrupted
from cl_dist.launch.child import PROGRAM, python_command, signal_when_parent_dies
from cl_dist.launch.local import STOP_SIGNALS
from cl_dist.state.atomic import make_folder, write_text
from cl_dist.stop_requests import heeded
from cl_dist.sweep.checks import state_of
from cl_dist.sweep.folder import SweepFolder
from cl_dist.sweep.grid import Cell

_PREFIXES = ("cl-dist: error: ", "cl-dist: interrupted: ")
"""How the messages of a failed run begin (`cl_dist.cli.failures.print_failure`)."""


@dataclass(frozen=True)
class Failure:
    """A cell whose run failed, and why."""

    cell: Cell
    reason: str


class CellRunner:
    """Runs cells, and stops between or inside them if a signal asks for it.

    Args:
        sweep: The folder that keeps the recipes of the cells.
        refresh: Called after each cell.
        options: Additional options for every `cl-dist run`.
    """

    def __init__(self, sweep: SweepFolder, refresh: Callable[[], None], options: Sequence[str] = ()) -> None:
        self._sweep, self._refresh, self._options = sweep, refresh, options
        self._process: subprocess.Popen[str] | None = None
        self._asked = False

    def run(self, cells: Sequence[Cell], stop_on_failure: bool) -> list[Failure]:
        """Run the unfinished cells and return the failed ones.

        Raises:
            Interrupted: A signal asked the sweep, or a run, to stop; its state is saved.
        """
        failures: list[Failure] = []
        with self._signals_passed_on():
            for number, cell in enumerate(cells, start=1):
                state = state_of(cell.folder)
                if state.finished:
                    continue
                place = f"[{number}/{len(cells)}] {cell.name}"
                reason = "its run folder is in use by another process"
                if state.status != "in use":
                    reason = self._run_cell(cell, place)
                    self._refresh()
                if reason:
                    failures.append(Failure(cell, reason))
                    print(f"{place}: failed: {reason}", flush=True)
                if reason and stop_on_failure:
                    break
        return failures

    def _run_cell(self, cell: Cell, place: str) -> str:
        """Run or resume one cell; return why it failed, or an empty string."""
        resume = cell.folder.manifest.exists()
        print(f"{place}: {'resuming' if resume else 'starting'} in {cell.folder.path}", flush=True)
        recipe = self._sweep.recipe(cell.order, cell.method, cell.seed)
        make_folder(recipe.parent)
        write_text(recipe, dump_recipe(cell.recipe))
        began = time.monotonic()
        command = [*python_command(PROGRAM), "run", str(recipe), *(["--resume"] if resume else []), *self._options]
        code, words = self._wait_for(command)
        # A run may also have been interrupted directly: then the sweep stops too.
        if self._asked or code == Interrupted.exit_code:
            self._refresh()
            raise Interrupted(f"stopped in {cell.name}; the saved state is intact, the same command continues")
        if code == 0 and state_of(cell.folder).finished:
            print(f"{place}: finished in {time.monotonic() - began:.0f} s", flush=True)
            return ""
        return words or f"its process ended with exit code {code}"

    def _wait_for(self, command: Sequence[str]) -> tuple[int, str]:
        """Run a command; return its exit code and the last failure message that it printed."""
        if self._asked:
            raise Interrupted("stopped between two cells; the same command continues")
        words: list[str] = []
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
            preexec_fn=partial(signal_when_parent_dies, signal.SIGTERM),
        )
        self._process = process
        if self._asked:  # a signal arrived while the process was starting
            process.send_signal(signal.SIGTERM)
        assert process.stderr is not None
        reader = threading.Thread(target=_pass_on, args=(process.stderr, words), daemon=True)
        reader.start()
        code = process.wait()
        self._process = None
        reader.join(timeout=5.0)
        return code, words[-1] if words else ""

    @contextmanager
    def _signals_passed_on(self) -> Iterator[None]:
        """Forward signals that ask to stop to the current run."""

        def stop(number: int, frame: FrameType | None) -> None:
            self._asked = True
            if self._process is not None:
                with suppress(ProcessLookupError):
                    self._process.send_signal(signal.SIGTERM)

        before = {number: signal.signal(number, stop) for number in heeded(STOP_SIGNALS)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _pass_on(stream: IO[str], words: list[str]) -> None:
    """Print a run's standard error, and collect its failure messages."""
    with stream:
        for line in stream:
            print(line, end="", file=sys.stderr, flush=True)
            prefix = next((prefix for prefix in _PREFIXES if line.startswith(prefix)), None)
            if prefix is not None:
                words.append(line.removeprefix(prefix).rstrip("\n"))
