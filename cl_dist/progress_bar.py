"""Progress of a run in a terminal: what it does now, and bars for its tasks, their steps and their evaluation."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO

from rich.console import Console, ConsoleDimensions
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column
from typing_extensions import override

from cl_dist.progress import Row, TimedReporter, count, format_summary, step_detail, task_scores
from cl_dist.time_left import Work, duration

WIDE = 100
"""With fewer columns, the bars are shorter and leave the learning rate out, so that each still fits into a line."""
NAME_COLUMNS = {False: 16, True: 24}
"""Columns for the name of a task, by whether the terminal is wide."""
BAR_COLUMNS = {False: 10, True: 24}
PHASE_SECONDS = 1.0
"""A phase that has taken longer is shown with its time when it is over."""


def bars_on(stream: TextIO, terminal: int | None) -> BarReporter:
    """The reporter for `stream`, a terminal or, with its file descriptor `terminal`, a pipe to one."""
    return BarReporter(
        Console(file=stream, force_terminal=True) if terminal is None else _PipedConsole(stream, terminal)
    )


class _PipedConsole(Console):
    """A console for a terminal behind a pipe; it asks the terminal itself for its size."""

    def __init__(self, stream: TextIO, terminal: int) -> None:
        super().__init__(file=stream, force_terminal=True)
        self._terminal = terminal

    @property
    def size(self) -> ConsoleDimensions:
        """The current columns and lines."""
        try:
            columns, lines = os.get_terminal_size(self._terminal)
        except OSError:  # the terminal was closed
            columns = lines = 0
        return ConsoleDimensions(columns or 80, lines or 25)

    @size.setter
    def size(self, new_size: tuple[int, int]) -> None:
        raise AttributeError("the size is the terminal's")


class BarReporter(TimedReporter):
    """Draws a line for what happens before training, and then two bars: the tasks, and the steps or the evaluation of
    the current one. Messages scroll by above them.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        """`console`: where to draw; `clock` returns the current time in seconds."""
        super().__init__(clock)
        self.console = console
        self._phase: tuple[str, float] | None = None
        """What happens before training, and since when."""
        self.phases = Progress(
            TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis")),
            TimeElapsedColumn(table_column=Column(no_wrap=True, min_width=7)),
            console=console,
            transient=True,
            refresh_per_second=4,
        )
        self._bar = BarColumn(bar_width=BAR_COLUMNS[True])
        self.progress = Progress(
            TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis")),
            self._bar,
            TextColumn("{task.fields[count]}"),
            TextColumn("{task.fields[detail]}", table_column=Column(no_wrap=True, overflow="ellipsis")),
            TextColumn("{task.fields[left]}", style="cyan"),
            console=console,
            refresh_per_second=4,
        )
        self.task_bar = self.progress.add_task("tasks", total=None, count="", detail="", left="", visible=False)
        self.step_bar = self.progress.add_task("start", total=None, count="", detail="", left="")

    @property
    def wide(self) -> bool:
        """Whether the terminal has room for everything."""
        return self.console.width >= WIDE

    @override
    def phase(self, text: str) -> None:
        self._end_phase()
        self._phase = (text, self.clock())
        self.phases.add_task(text, total=None)
        self.phases.start()

    def _end_phase(self) -> None:
        """Replace the line of the current phase, if there is one, by one that stays."""
        if self._phase is None:
            return
        (text, began), self._phase = self._phase, None
        for number in self.phases.task_ids:
            self.phases.remove_task(number)
        self.phases.stop()
        seconds = self.clock() - began
        self._print(text + (f": {duration(seconds)}" if seconds >= PHASE_SECONDS else ""))

    @override
    def run_started(self, tasks: Sequence[str], ranks: int, work: Work | None = None) -> None:
        super().run_started(tasks, ranks, work)
        self._end_phase()
        self._update(self.task_bar, total=len(tasks), completed=0, detail=count(ranks, "rank"), visible=True)
        self.progress.start()

    @override
    def task_started(self, index: int, name: str, steps: int) -> None:
        super().task_started(index, name, steps)
        self._update(self.task_bar, completed=index)
        self._begin(name, steps)

    def _begin(self, name: str, total: int) -> None:
        """Restart the lower bar."""
        self._end_phase()
        self.progress.start()
        most = NAME_COLUMNS[self.wide]
        short = name if len(name) <= most else f"{name[: most - 1]}…"
        # Without a number to come, the bar moves back and forth.
        self.progress.reset(self.step_bar, total=total or None, description=short)
        self._update(self.step_bar, total=total or None, completed=0, detail="", left="")

    def _update(self, bar: Any, **fields: Any) -> None:
        self._bar.bar_width = BAR_COLUMNS[self.wide]
        self.progress.update(bar, **fields)
        shown = self.progress.tasks[bar]
        counted = "" if shown.total is None else f"{shown.completed:.0f}/{shown.total:.0f}"
        self.progress.update(bar, count=counted)

    @override
    def step(self, step: int, loss: float, tokens_per_second: float, lr: float) -> None:
        super().step(step, loss, tokens_per_second, lr)
        detail = step_detail(loss, tokens_per_second, lr if self.wide else None)
        self._update(self.step_bar, completed=step, detail=detail, left=self.task_left())
        self._update(self.task_bar, left=self.run_left())

    @override
    def evaluating(self, name: str, samples: int = 0, later: int = 0) -> None:
        super().evaluating(name, samples, later)
        self._begin(name, samples)
        self._update(self.step_bar, detail="evaluating")

    @override
    def evaluated(self, done: int, samples: int) -> None:
        super().evaluated(done, samples)
        self._update(self.step_bar, completed=done, left=self.scoring_left())
        self._update(self.task_bar, left=self.run_left())

    @override
    def task_finished(self, index: int, row: Row) -> None:
        super().task_finished(index, row)
        self._update(self.task_bar, completed=index + 1, left=self.run_left())
        self.message(task_scores(index, self.tasks, row))

    @override
    def message(self, text: str) -> None:
        self._end_phase()
        self._print(text)

    def _print(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    @override
    def run_finished(self, metrics: Mapping[str, Any]) -> None:
        self.close()
        self.message(format_summary(metrics))

    @override
    def close(self) -> None:
        self._end_phase()
        self.progress.stop()
