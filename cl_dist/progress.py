"""Progress of a run on rank 0: a progress bar in a terminal, plain lines elsewhere; and the summary of its scores."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, TextIO

from rich.console import Console, ConsoleDimensions
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from typing_extensions import override

from cl_dist.config.words import listed
from cl_dist.errors import ClDistError

LINE_SECONDS = 5.0
"""Without a terminal, a line is printed this often, and at every tenth of a task's steps."""
WIDEST_MATRIX = 25
"""With more tasks than this, the table has a line per task instead of a column."""
SUMMARY = {
    "average_performance": "average performance (AP)",
    "backward_transfer": "backward transfer (BWT)",
    "forward_transfer_zero_shot": "forward transfer (FWT, zero-shot)",
    "forgetting": "forgetting",
    "learning_accuracy": "learning accuracy",
    "tokens_per_second": "tokens per second",
}
"""The keys of metrics.json that are shown at the end of a run, and their labels."""
MOST_NAMED = 25
"""Tasks that are named in a line; the others are counted."""
COUNTS = {
    "cut_generations": "generations cut at eval.max_new_tokens in the last evaluation",
    "answers_outside_labels": "evaluation answers that match no label, so that no prediction can be right",
}
"""Counts per task in metrics.json that are shown if they are not 0, and their labels."""

SOURCES = {
    "scored_on": {
        "train": "scored on training data",
        "dev": "scored on the dev split",
        "held-out": "scored on samples held out of the training data",
    },
    "labels_from": {"training answers": "labels found in the training answers"},
}
"""Values per task in metrics.json that a reader should know about, and what is said."""

Row = Sequence[float | None]


class Reporter:
    """What the coordinator calls on every rank. This one reports nothing; the others override what they show."""

    def run_started(self, tasks: Sequence[str], ranks: int) -> None:
        """A run over `tasks` starts or resumes."""

    def task_started(self, index: int, name: str, steps: int) -> None:
        """Training on task `index` (from 0), which has `steps` optimiser steps, starts or resumes."""

    def step(self, step: int, loss: float, tokens_per_second: float, lr: float) -> None:
        """`step` optimiser steps of the task are done; loss and speed belong to the last one, over all ranks."""

    def evaluating(self, name: str) -> None:
        """Evaluation on task `name` starts."""

    def task_finished(self, index: int, row: Row) -> None:
        """Task `index` is trained and evaluated; `row` has the scores on all tasks, None if not evaluated."""

    def message(self, text: str) -> None:
        """A message for the user."""

    def run_finished(self, metrics: Mapping[str, Any]) -> None:
        """The run is finished; `metrics` is the content of metrics.json."""

    def close(self) -> None:
        """Release the terminal, after an error too."""


def make_reporter(rank: int, stream: TextIO, terminal: int | None = None) -> Reporter:
    """The reporter of a rank. Only rank 0 reports; it draws a bar if `stream` is a terminal that supports it.

    `terminal`: a file descriptor of the terminal behind `stream`, if that is a pipe. A reporter never raises when
    printing fails, so that the run continues.
    """
    if rank != 0:
        return Reporter()
    console = Console(file=stream) if terminal is None else _PipedConsole(stream, terminal)
    draws = console.is_terminal and not console.is_dumb_terminal
    return UnfailingReporter(BarReporter(console) if draws else LineReporter(stream), stream)


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


class LineReporter(Reporter):
    """Prints plain lines, few enough for a log file."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` returns the current time in seconds."""
        self.stream = stream
        self.clock = clock
        self.tasks: Sequence[str] = ()
        self.steps = 0
        self.first: tuple[int, float] | None = None
        """Step and time of the first report on the task in this process, the basis for the time left."""
        self.last: tuple[int, float] = (0, 0.0)
        """Step and time of the last line."""

    @override
    def run_started(self, tasks: Sequence[str], ranks: int) -> None:
        self.tasks = tasks
        self.message(f"{len(tasks)} tasks on {_count(ranks, 'rank')}: {', '.join(tasks)}")

    @override
    def task_started(self, index: int, name: str, steps: int) -> None:
        self.steps, self.first, self.last = steps, None, (0, self.clock())
        self.message(f"task {index + 1}/{len(self.tasks)} {name}: {_count(steps, 'step')}")

    @override
    def step(self, step: int, loss: float, tokens_per_second: float, lr: float) -> None:
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

    @override
    def evaluating(self, name: str) -> None:
        self.message(f"  evaluating {name}")

    @override
    def task_finished(self, index: int, row: Row) -> None:
        self.message(_scores(index, self.tasks, row))

    @override
    def message(self, text: str) -> None:
        self.stream.write(f"{text}\n")
        self.stream.flush()

    @override
    def run_finished(self, metrics: Mapping[str, Any]) -> None:
        self.message(format_summary(metrics))


class UnfailingReporter(Reporter):
    """Wraps a reporter and absorbs its errors: after the first, plain lines replace a bar; after the second, nothing.

    Args:
        reporter: The reporter to use until it fails.
        stream: Where the plain lines go.
    """

    def __init__(self, reporter: Reporter, stream: TextIO) -> None:
        self.reporter, self._stream = reporter, stream
        self._tasks: Sequence[str] = ()
        self._task: tuple[int, str, int] | None = None

    @override
    def run_started(self, tasks: Sequence[str], ranks: int) -> None:
        self._tasks = tasks
        self._try("run_started", tasks, ranks)

    @override
    def task_started(self, index: int, name: str, steps: int) -> None:
        self._task = (index, name, steps)
        self._try("task_started", index, name, steps)

    @override
    def step(self, step: int, loss: float, tokens_per_second: float, lr: float) -> None:
        self._try("step", step, loss, tokens_per_second, lr)

    @override
    def evaluating(self, name: str) -> None:
        self._try("evaluating", name)

    @override
    def task_finished(self, index: int, row: Row) -> None:
        self._try("task_finished", index, row)

    @override
    def message(self, text: str) -> None:
        self._try("message", text)

    @override
    def run_finished(self, metrics: Mapping[str, Any]) -> None:
        self._try("run_finished", metrics)

    @override
    def close(self) -> None:
        self._try("close")

    def _try(self, what: str, *arguments: Any) -> None:
        try:
            getattr(self.reporter, what)(*arguments)
        except ClDistError:  # raised by a signal handler, not by printing
            raise
        except Exception as error:
            self._replace(error)

    def _replace(self, error: Exception) -> None:
        failed, self.reporter = self.reporter, Reporter()
        with suppress(Exception):
            failed.close()
        if isinstance(failed, BarReporter):
            self.reporter = LineReporter(self._stream)
            self.reporter.tasks = self._tasks
            self.message(f"no progress bar from here on: {type(error).__name__}: {error}")
            if self._task is not None:
                self.task_started(*self._task)


class BarReporter(Reporter):
    """Draws two bars, for the tasks and for the task's steps; messages scroll by above them."""

    def __init__(self, console: Console) -> None:
        """`console`: where to draw."""
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

    @override
    def run_started(self, tasks: Sequence[str], ranks: int) -> None:
        self.tasks = tasks
        self.progress.update(self.task_bar, total=len(tasks), detail=_count(ranks, "rank"))
        self.progress.start()

    @override
    def task_started(self, index: int, name: str, steps: int) -> None:
        self.progress.update(self.task_bar, completed=index)
        self.progress.reset(self.step_bar, total=steps, description=name, detail="")

    @override
    def step(self, step: int, loss: float, tokens_per_second: float, lr: float) -> None:
        self.progress.update(self.step_bar, completed=step, detail=_detail(loss, tokens_per_second, lr))

    @override
    def evaluating(self, name: str) -> None:
        self.progress.update(self.step_bar, description=f"evaluating {name}")

    @override
    def task_finished(self, index: int, row: Row) -> None:
        self.progress.update(self.task_bar, completed=index + 1)
        self.message(_scores(index, self.tasks, row))

    @override
    def message(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    @override
    def run_finished(self, metrics: Mapping[str, Any]) -> None:
        self.close()
        self.message(format_summary(metrics))

    @override
    def close(self) -> None:
        self.progress.stop()


def format_matrix(tasks: Sequence[str], matrix: Sequence[Row]) -> str:
    """The accuracy matrix as a table: the first row before training, then one row per trained task; `-` means not
    evaluated. For a long stream: each task's score right after its own training and its latest score.
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
    """Each task with its score right after its own training (None: not trained yet) and its latest score."""
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
    """The summary of a run: the matrix, a line per metric, and notes on the scores."""
    width = max(map(len, SUMMARY.values()))
    lines = []
    for key, name in SUMMARY.items():
        value = metrics.get(key)
        shown = f"{value:.0f}" if key == "tokens_per_second" and value is not None else _score(value)
        lines.append(f"{name:<{width}}  {shown}")
    matrix = format_matrix(metrics["tasks"], metrics["accuracy_matrix"])
    return "\n".join([matrix, "", *lines, *how_scored(metrics), *score_notes(metrics)])


def how_scored(scoring: Mapping[str, Any]) -> list[str]:
    """How the tasks were scored, a line for each way, from the values per task in metrics.json."""
    ways: dict[str, list[str]] = {}
    for task, metric in scoring.get("metric", {}).items():
        mode, split = scoring.get("mode", {}).get(task), scoring.get("scored_on", {}).get(task)
        way = metric + (f" by {mode}" if mode else "") + (f", {split} split" if split else "")
        ways.setdefault(way, []).append(task)
    if len(ways) == 1:
        return [f"scores: {way}" for way in ways]
    return [f"scores: {way}: {listed(tasks, MOST_NAMED)}" for way, tasks in ways.items()]


def score_notes(metrics: Mapping[str, Any]) -> list[str]:
    """Notes that readers of the scores need, a sentence each, from the values per task in metrics.json."""
    different = different_scores(score_names(metrics))
    notes = [f"the metrics are means of different scores: {different}"] if different else []
    general = {
        name: str(values.get("metric"))
        for entry in metrics.get("general", ())
        for name, values in entry["scores"].items()
    }
    if different := different_scores(general):
        notes.append(f"general ability is a mean of different scores: {different}")
    for key, what in SOURCES.items():
        for source, tasks in _by_value(metrics.get(key, {})).items():
            notes += [f"{what[source]}: {listed(tasks, MOST_NAMED)}"] if source in what else []
    for key, label in COUNTS.items():
        if counts := [f"{task} {count}" for task, count in metrics.get(key, {}).items() if count]:
            notes.append(f"{label}: {listed(counts, MOST_NAMED)}")
    return notes


def score_names(scoring: Mapping[str, Any]) -> dict[str, str]:
    """The kind of each task's score: its metric, and the mode if it scores other tasks in another one, since choosing
    one of the labels is easier than writing the answer.
    """
    metric, mode = scoring.get("metric", {}), scoring.get("mode", {})
    modes: dict[str, set[str]] = {}
    for task, name in metric.items():
        modes.setdefault(name, set()).add(mode.get(task, ""))
    return {
        task: f"{name} by {mode[task]}" if len(modes[name]) > 1 and task in mode else name
        for task, name in metric.items()
    }


def different_scores(names: Mapping[str, str]) -> str:
    """`exact_match (a, b); rouge_l (c)` if the tasks have different kinds of scores, otherwise an empty string."""
    kinds = _by_value(names)
    found = (f"{name} ({listed(tasks, MOST_NAMED)})" for name, tasks in kinds.items())
    return "; ".join(found) if len(kinds) > 1 else ""


def _by_value(values: Mapping[str, str]) -> dict[str, list[str]]:
    """The tasks of each value."""
    tasks: dict[str, list[str]] = {}
    for task, value in values.items():
        tasks.setdefault(value, []).append(task)
    return tasks


def _score(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _scores(index: int, tasks: Sequence[str], row: Row) -> str:
    scores = (f"{name} {_score(score)}" for name, score in zip(tasks, row, strict=True) if score is not None)
    return f"after {tasks[index]}: {', '.join(scores)}"


def _detail(loss: float, tokens_per_second: float, lr: float) -> str:
    return f"loss {loss:.4f}  {tokens_per_second:.0f} tokens/s  lr {lr:.2g}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
