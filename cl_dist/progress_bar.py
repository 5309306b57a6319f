"""Progress of a run in a terminal: what it does now, and bars for its tasks, their steps and their evaluation."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO

from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleDimensions
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Column
from typing_extensions import override

from cl_dist.progress import Row, TimedReporter, count, format_summary, step_details, task_scores
from cl_dist.time_left import Work, duration

WIDE, MEDIUM = 100, 60
"""With fewer columns, names and bars are shorter; what the last figures have no room for is left out."""
NAME_COLUMNS = {WIDE: 24, MEDIUM: 16, 0: 8}
"""Most columns for the name of a task, by how wide the terminal is at least."""
BAR_COLUMNS = {WIDE: 24, MEDIUM: 10, 0: 5}
LEFT_COLUMNS = len("99 min left")
"""At least, so that the figures behind it stay where they are."""
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
    the current one. Messages scroll by above them; at the end the bars disappear.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        """`console`: where to draw; `clock` returns the current time in seconds."""
        super().__init__(clock)
        self.console = console
        self._phase: tuple[str, float] | None = None
        """What happens before training, and since when."""
        self.phases = Progress(
            TextColumn("{task.description}", table_column=_cut()),
            TimeElapsedColumn(table_column=Column(no_wrap=True, min_width=7)),
            console=console,
            transient=True,
            refresh_per_second=4,
        )
        self._bar = BarColumn(bar_width=BAR_COLUMNS[WIDE])
        # What grows, shrinks and is left out comes last, so that the rest does not move.
        self.progress = Progress(
            TextColumn("{task.description}", table_column=_cut()),
            self._bar,
            TextColumn("{task.fields[count]}"),
            TextColumn("{task.fields[left]}", style="cyan", table_column=Column(no_wrap=True, min_width=LEFT_COLUMNS)),
            TextColumn("{task.fields[detail]}", table_column=_cut()),
            console=console,
            transient=True,
            refresh_per_second=4,
        )
        self._longest = cell_len("tasks")
        """Columns of the longest name so far; tasks that are evaluated together have a longer one."""
        nothing: dict[str, Any] = {"count": "", "detail": "", "left": ""}
        self.task_bar = self.progress.add_task("tasks", total=None, visible=False, **nothing)
        self.step_bar = self.progress.add_task("start", total=None, visible=False, **nothing)

    def _widest(self, columns: Mapping[int, int]) -> int:
        """The entry for the terminal's present width."""
        return next(columns[least] for least in columns if self.console.width >= least)

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
    def working(self, text: str) -> None:
        self._update(self.step_bar, [text], left="", visible=True)

    @override
    def run_started(self, tasks: Sequence[str], ranks: int, work: Work | None = None) -> None:
        super().run_started(tasks, ranks, work)
        self._end_phase()
        self._update(self.task_bar, [count(ranks, "rank")], total=len(tasks), completed=0, visible=True)
        self.progress.start()

    @override
    def task_started(self, index: int, name: str, steps: int) -> None:
        super().task_started(index, name, steps)
        self._update(self.task_bar, completed=index)
        self._begin(name, steps)

    def _begin(self, name: str, total: int, *details: str) -> None:
        """Restart the lower bar."""
        self._end_phase()
        # Without a number to come, the bar moves back and forth.
        started = {"total": total or None, "completed": 0, "description": self._name(name), "left": ""}
        self._update(self.step_bar, details, **started, visible=True)
        self.progress.start()

    def _name(self, name: str) -> str:
        """A task's name, cut or filled up so that the bars stand where they stood for the other tasks."""
        most = self._widest(NAME_COLUMNS)
        self._longest = max(self._longest, *map(cell_len, [name, *self.tasks]))
        width = min(most, self._longest)
        if cell_len(name) <= width:
            return set_cell_size(name, width)
        dots = "..." if self.console.options.ascii_only else "…"
        return set_cell_size(name, width - len(dots)) + dots

    def _update(self, bar: TaskID, details: Sequence[str] | None = None, **fields: Any) -> None:
        """Change a bar, in one call because it may be drawn between two.

        `details`: what to show at its end, as far as there is room (None: as before).
        """
        self._bar.bar_width = self._widest(BAR_COLUMNS)
        task = next(task for task in self.progress.tasks if task.id == bar)
        task.total = fields.pop("total", task.total)  # `Progress.update` cannot make it unknown again
        completed = fields.get("completed", task.completed)
        fields["count"] = "" if task.total is None else f"{completed:>{len(f'{task.total:.0f}')}.0f}/{task.total:.0f}"
        if details is not None:
            left = max(LEFT_COLUMNS, *(len(each.fields["left"]) for each in self.progress.tasks))
            name = cell_len(fields.get("description", task.description))
            taken = name + self._widest(BAR_COLUMNS) + len(fields["count"]) + left + 4
            fields["detail"] = _fitting(details, self.console.width - taken)
        self.progress.update(bar, **fields)

    @override
    def step(self, step: int, loss: float, tokens_per_second: float, lr: float) -> None:
        super().step(step, loss, tokens_per_second, lr)
        self._update(self.task_bar, left=self.run_left())
        details = step_details(loss, tokens_per_second, lr)
        self._update(self.step_bar, details, completed=step, left=self.task_left())

    @override
    def evaluating(self, name: str, samples: int = 0, later: int = 0) -> None:
        super().evaluating(name, samples, later)
        self._begin(name, samples, "evaluating")

    @override
    def evaluated(self, done: int, samples: int) -> None:
        super().evaluated(done, samples)
        self._update(self.task_bar, left=self.run_left())
        self._update(self.step_bar, completed=done, left=self.scoring_left())

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
        self.message(format_summary(metrics, self.console.width))

    @override
    def close(self) -> None:
        self._end_phase()
        self.progress.stop()


def _cut() -> Column:
    """A column whose text is cut where the terminal ends."""
    return Column(no_wrap=True, overflow="crop")


def _fitting(parts: Sequence[str], room: int) -> str:
    """The first of `parts`, as many as fit."""
    shown = ""
    for part in parts:
        longer = f"{shown}  {part}" if shown else part
        if cell_len(longer) > room:
            break
        shown = longer
    return shown
