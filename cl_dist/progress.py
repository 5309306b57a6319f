"""What a run tells while it runs: a progress bar in a terminal, plain lines elsewhere, nothing on ranks other than
0.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol, TextIO

from rich.console import Console, ConsoleDimensions
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cl_dist.errors import ClDistError

LINE_SECONDS = 5.0
"""Without a terminal a line is due after so many seconds, and at every tenth of a task's steps."""
WIDEST_MATRIX = 25
"""Tasks up to which a table has a column for each; with more it has a line for each."""
SUMMARY = {
    "average_performance": "average performance (AP)",
    "backward_transfer": "backward transfer (BWT)",
    "forward_transfer_zero_shot": "forward transfer (FWT, zero-shot)",
    "forgetting": "forgetting",
    "learning_accuracy": "learning accuracy",
    "tokens_per_second": "tokens per second",
}
"""The keys of metrics.json that end a run, and their names."""
COUNTS = {
    "cut_generations": "generations cut at eval.max_new_tokens in the last evaluation",
    "answers_outside_labels": "evaluation answers that match no label, so that no prediction can be right",
}
"""Counts by task in metrics.json that are shown where they are not 0, and what they count."""

Row = Sequence[float | None]


class Reporter(Protocol):
    """What the coordinator calls on every rank."""

    def run_started(self, tasks: Sequence[str], ranks: int) -> None:
        """A run over `tasks` begins or goes on."""

    def task_started(self, index: int, name: str, steps: int) -> None:
        """Training on task `index` (from 0) begins or goes on; it has so many optimiser steps."""

    def step(self, step: int, loss: float, tokens_per_second: float, lr: float) -> None:
        """`step` optimiser steps of the task are done; loss and speed are those of the last one, over all ranks."""

    def evaluating(self, name: str) -> None:
        """The model is being evaluated on task `name`."""

    def task_finished(self, index: int, row: Row) -> None:
        """Task `index` is trained and evaluated: the scores on all tasks, None where not evaluated."""

    def message(self, text: str) -> None:
        """Something that the user should know."""

    def run_finished(self, metrics: Mapping[str, Any]) -> None:
        """The run is done; `metrics` is what metrics.json holds."""

    def close(self) -> None:
        """Give the terminal back, also after an error."""


def make_reporter(rank: int, stream: TextIO, terminal: int | None = None) -> Reporter:
    """The reporter of a rank: silent but for rank 0, which has a bar where `stream` is a terminal that can draw one.

    `terminal`: a descriptor of the terminal that `stream`, a pipe, leads to. A reporter never raises what has gone
    wrong with printing: the run goes on.
    """
    if rank != 0:
        return SilentReporter()
    console = Console(file=stream) if terminal is None else _PipedConsole(stream, terminal)
    draws = console.is_terminal and not console.is_dumb_terminal
    return UnfailingReporter(BarReporter(console) if draws else LineReporter(stream), stream)


class _PipedConsole(Console):
    """A terminal behind a pipe: everything is as it would be, but for where its size is asked."""

    def __init__(self, stream: TextIO, terminal: int) -> None:
        super().__init__(file=stream, force_terminal=True)
        self._terminal = terminal

    @property
    def size(self) -> ConsoleDimensions:
        """Columns and lines, as they are now."""
        try:
            columns, lines = os.get_terminal_size(self._terminal)
        except OSError:  # it was closed
            columns = lines = 0
        return ConsoleDimensions(columns or 80, lines or 25)

    @size.setter
    def size(self, new_size: tuple[int, int]) -> None:
        raise AttributeError("the size is the terminal's")


class SilentReporter:
    """Tells nothing."""

    def run_started(self, tasks: Sequence[str], ranks: int) -> None:
        """Nothing."""

    def task_started(self, index: int, name: str, steps: int) -> None:
        """Nothing."""

    def step(self, step: int, loss: float, tokens_per_second: float, lr: float) -> None:
        """Nothing."""

    def evaluating(self, name: str) -> None:
        """Nothing."""

    def task_finished(self, index: int, row: Row) -> None:
        """Nothing."""

    def message(self, text: str) -> None:
        """Nothing."""

    def run_finished(self, metrics: Mapping[str, Any]) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class LineReporter(SilentReporter):
    """Plain lines, few enough for a log file."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` returns seconds."""
        self.stream = stream
        self.clock = clock
        self.tasks: Sequence[str] = ()
        self.steps = 0
        self.first: tuple[int, float] | None = None
        """Step and time of the task's first report, which the time left is reckoned from."""
        self.last: tuple[int, float] = (0, 0.0)
        """Step and time of the last line."""

    def run_started(self, tasks: Sequence[str], ranks: int) -> None:
        """Say how much there is to do."""
        self.tasks = tasks
        self.message(f"{len(tasks)} tasks on {_count(ranks, 'rank')}: {', '.join(tasks)}")

    def task_started(self, index: int, name: str, steps: int) -> None:
        """Name the task."""
        self.steps, self.first, self.last = steps, None, (0, self.clock())
        self.message(f"task {index + 1}/{len(self.tasks)} {name}: {_count(steps, 'step')}")

    def step(self, step: int, loss: float, tokens_per_second: float, lr: float) -> None:
        """A line where one is due."""
        now = self.clock()
        self.first = self.first or (step, now)
        last_step, last_time = self.last
        tenth = 10 * step // self.steps > 10 * last_step // self.steps
        if tenth or now - last_time >= LINE_SECONDS:
            self.last = (step, now)
            detail = _detail(loss, tokens_per_second, lr)
            self.message(f"  step {step}/{self.steps}  {detail}{self._time_left(step, now)}")

    def _time_left(self, step: int, now: float) -> str:
        if self.first is None or step == self.first[0]:
            return ""
        seconds = (now - self.first[1]) / (step - self.first[0]) * (self.steps - step)
        return f"  {seconds:.0f} s left"

    def evaluating(self, name: str) -> None:
        """Name the task that is evaluated."""
        self.message(f"  evaluating {name}")

    def task_finished(self, index: int, row: Row) -> None:
        """The scores so far."""
        self.message(_scores(index, self.tasks, row))

    def message(self, text: str) -> None:
        """The text as it is."""
        self.stream.write(f"{text}\n")
        self.stream.flush()

    def run_finished(self, metrics: Mapping[str, Any]) -> None:
        """The accuracy matrix and the metrics."""
        self.message(format_summary(metrics))


class UnfailingReporter:
    """Another reporter, without its errors: after the first one it prints plain lines, after the second nothing.

    Args:
        reporter: The one in use, until it fails.
        stream: Where the lines go.
    """

    def __init__(self, reporter: Reporter, stream: TextIO) -> None:
        self.reporter, self._stream = reporter, stream
        self._tasks: Sequence[str] = ()
        self._task: tuple[int, str, int] | None = None

    def run_started(self, tasks: Sequence[str], ranks: int) -> None:
        """Passed on."""
        self._tasks = tasks
        self._try("run_started", tasks, ranks)

    def task_started(self, index: int, name: str, steps: int) -> None:
        """Passed on."""
        self._task = (index, name, steps)
        self._try("task_started", index, name, steps)

    def step(self, step: int, loss: float, tokens_per_second: float, lr: float) -> None:
        """Passed on."""
        self._try("step", step, loss, tokens_per_second, lr)

    def evaluating(self, name: str) -> None:
        """Passed on."""
        self._try("evaluating", name)

    def task_finished(self, index: int, row: Row) -> None:
        """Passed on."""
        self._try("task_finished", index, row)

    def message(self, text: str) -> None:
        """Passed on."""
        self._try("message", text)

    def run_finished(self, metrics: Mapping[str, Any]) -> None:
        """Passed on."""
        self._try("run_finished", metrics)

    def close(self) -> None:
        """Passed on."""
        self._try("close")

    def _try(self, what: str, *arguments: Any) -> None:
        try:
            getattr(self.reporter, what)(*arguments)
        except ClDistError:  # of a signal that has come meanwhile
            raise
        except Exception as error:
            self._replace(error)

    def _replace(self, error: Exception) -> None:
        failed, self.reporter = self.reporter, SilentReporter()
        with suppress(Exception):
            failed.close()
        if isinstance(failed, BarReporter):
            self.reporter = LineReporter(self._stream)
            self.reporter.tasks = self._tasks
            self.message(f"no progress bar from here on: {type(error).__name__}: {error}")
            if self._task is not None:
                self.task_started(*self._task)


class BarReporter:
    """Two bars, of tasks and of the task's steps; what is said in between scrolls by above them."""

    def __init__(self, console: Console) -> None:
        """Draws on `console`."""
        self.console = console
        self.tasks: Sequence[str] = ()
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[detail]}"),
            TimeRemainingColumn(),
            console=console,
        )
        self.task_bar = self.progress.add_task("tasks", total=None, detail="")
        self.step_bar = self.progress.add_task("start", total=None, detail="")

    def run_started(self, tasks: Sequence[str], ranks: int) -> None:
        """Start drawing."""
        self.tasks = tasks
        self.progress.update(self.task_bar, total=len(tasks), detail=_count(ranks, "rank"))
        self.progress.start()

    def task_started(self, index: int, name: str, steps: int) -> None:
        """A fresh bar of steps."""
        self.progress.update(self.task_bar, completed=index)
        self.progress.reset(self.step_bar, total=steps, description=name, detail="")

    def step(self, step: int, loss: float, tokens_per_second: float, lr: float) -> None:
        """Move the bar of steps."""
        self.progress.update(self.step_bar, completed=step, detail=_detail(loss, tokens_per_second, lr))

    def evaluating(self, name: str) -> None:
        """Say so beside the bar."""
        self.progress.update(self.step_bar, description=f"evaluating {name}")

    def task_finished(self, index: int, row: Row) -> None:
        """Move the bar of tasks and leave the scores above."""
        self.progress.update(self.task_bar, completed=index + 1)
        self.message(_scores(index, self.tasks, row))

    def message(self, text: str) -> None:
        """The text as it is, above the bars."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def run_finished(self, metrics: Mapping[str, Any]) -> None:
        """The accuracy matrix and the metrics, in place of the bars."""
        self.close()
        self.message(format_summary(metrics))

    def close(self) -> None:
        """Stop drawing and show the cursor again."""
        self.progress.stop()


def format_matrix(tasks: Sequence[str], matrix: Sequence[Row]) -> str:
    """The accuracy matrix as a table: a row per trained task, the first one before training; `-` where not
    evaluated. Of a long stream each task's score after its own training and the last one.
    """
    if len(tasks) > WIDEST_MATRIX:
        return _format_long(tasks, matrix)
    labels = ["before", *(f"after {name}" for name in tasks)][: len(matrix)]
    left = max(map(len, labels), default=0)
    widths = [max(len(name), 6) for name in tasks]
    header = " " * left + "".join(f"  {name:>{width}}" for name, width in zip(tasks, widths, strict=True))
    rows = (
        f"{label:<{left}}" + "".join(f"  {_score(score):>{width}}" for score, width in zip(row, widths, strict=True))
        for label, row in zip(labels, matrix, strict=True)
    )
    return "\n".join([header, *rows])


def own_and_last(tasks: Sequence[str], matrix: Sequence[Row]) -> Iterator[tuple[str, float | None, float | None]]:
    """Each task with its score right after its own training (None: not trained yet) and its last one."""
    for position, name in enumerate(tasks):
        own = matrix[position + 1][position] if position + 1 < len(matrix) else None
        yield name, own, matrix[-1][position] if len(matrix) else None


def _format_long(tasks: Sequence[str], matrix: Sequence[Row]) -> str:
    width = max(map(len, tasks))
    header = f"{'':<{width}}  after its training     now"
    lines = (
        f"{name:<{width}}  {_score(own):>18}  {_score(last):>6}" for name, own, last in own_and_last(tasks, matrix)
    )
    return "\n".join([header, *lines])


def format_summary(metrics: Mapping[str, Any]) -> str:
    """What ends a run: the matrix and a line per metric."""
    width = max(map(len, SUMMARY.values()))
    lines = (f"{name:<{width}}  {_metric(key, metrics.get(key))}" for key, name in SUMMARY.items())
    return "\n".join([format_matrix(metrics["tasks"], metrics["accuracy_matrix"]), "", *lines, *score_notes(metrics)])


def score_notes(metrics: Mapping[str, Any]) -> list[str]:
    """What readers of the scores must know, a sentence each; `metrics` has what metrics.json says by task."""
    splits: dict[str, list[str]] = {}
    for task, split in metrics.get("scored_on", {}).items():
        splits.setdefault(split, []).append(task)
    different = different_scores(metrics.get("metric", {}))
    notes = [f"the metrics are means of different scores: {different}"] if different else []
    notes += [f"scored on training data: {', '.join(splits['train'])}"] if "train" in splits else []
    notes += [f"scored on the dev split: {', '.join(splits['dev'])}"] if "dev" in splits else []
    for key, what in COUNTS.items():
        if counts := [f"{task} {count}" for task, count in metrics.get(key, {}).items() if count]:
            notes.append(f"{what}: {', '.join(counts)}")
    return notes


def different_scores(metric: Mapping[str, str]) -> str:
    """`exact_match (a, b); rouge_l (c)` where the tasks are scored by different metrics, else nothing."""
    by_name: dict[str, list[str]] = {}
    for task, name in metric.items():
        by_name.setdefault(name, []).append(task)
    return "; ".join(f"{name} ({', '.join(tasks)})" for name, tasks in by_name.items()) if len(by_name) > 1 else ""


def _metric(key: str, value: float | None) -> str:
    return f"{value:.0f}" if key == "tokens_per_second" and value is not None else _score(value)


def _score(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _scores(index: int, tasks: Sequence[str], row: Row) -> str:
    scores = (f"{name} {_score(score)}" for name, score in zip(tasks, row, strict=True) if score is not None)
    return f"after {tasks[index]}: {', '.join(scores)}"


def _detail(loss: float, tokens_per_second: float, lr: float) -> str:
    return f"loss {loss:.4f}  {tokens_per_second:.0f} tokens/s  lr {lr:.2g}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
