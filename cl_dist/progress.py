"""Progress of a run on rank 0: a progress bar in a terminal, plain lines elsewhere; and the summary of its scores."""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from typing_extensions import override

from cl_dist.config.words import listed
from cl_dist.errors import ClDistError
from cl_dist.time_left import Forecast, Work, duration

LINE_SECONDS, MOST_LINE_SECONDS, LINE_GROWTH = 5.0, 60.0, 1.5
"""Without a terminal, the first lines of a task are this far apart, the later ones each `LINE_GROWTH` times as far, up
to a minute. Every tenth of a task's steps also has a line."""
PHASE_SECONDS = 10.0
"""A phase that takes longer is reported again after this time, and then every time twice as much has passed."""
WAITING_SECONDS = 1.0
"""How often the time of a command that waits is shown."""
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

    def phase(self, text: str) -> None:
        """Something that takes time before training begins; it ends with the next report of any kind."""

    def working(self, text: str) -> None:
        """Something inside a task that may take a while, such as saving; it ends with the next report of any kind."""

    def run_started(self, tasks: Sequence[str], ranks: int, work: Work | None = None) -> None:
        """A run over `tasks` starts or resumes; without `work`, the time left of the run is not known."""

    def task_started(self, index: int, name: str, steps: int) -> None:
        """Training on task `index` (from 0), which has `steps` optimiser steps, starts or resumes."""

    def step(self, step: int, loss: float, tokens_per_second: float, lr: float) -> None:
        """`step` optimiser steps of the task are done; loss and speed belong to the last one, over all ranks."""

    def evaluating(self, name: str, samples: int = 0, later: int = 0) -> None:
        """Evaluation on task `name` starts: `samples` samples (0: unknown), and `later` of other tasks after them."""

    def evaluated(self, done: int, samples: int) -> None:
        """`done` of the `samples` samples of that evaluation are scored."""

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
    # Open MPI gives every rank a terminal of its own, also where mpirun itself prints into a file.
    straight = terminal is not None or (_is_terminal(stream) and "OMPI_COMM_WORLD_SIZE" not in os.environ)
    if not straight or _shows_no_bars(os.environ):
        return UnfailingReporter(LineReporter(stream), stream)
    from cl_dist.progress_bar import bars_on  # imports rich

    return UnfailingReporter(bars_on(stream, terminal), stream)


def _is_terminal(stream: TextIO) -> bool:
    try:
        return stream.isatty()
    except ValueError:  # closed
        return False


def _shows_no_bars(environment: Mapping[str, str]) -> bool:
    """Whether a terminal cannot move its cursor, as a notebook's: Jupyter starts commands in one, and shows each state
    of a bar below the last one. Jupyter sets the first of these variables, and its kernel the others.
    """
    in_notebook = "JPY_PARENT_PID" in environment or environment.get("PAGER") == environment.get("GIT_PAGER") == "cat"
    return in_notebook or environment.get("TERM", "dumb") in ("dumb", "unknown", "")


@contextmanager
def waiting(text: str) -> Iterator[None]:
    """Context of a command that prints only at its end: until then, a terminal shows what it does and for how long.

    This goes to standard error, since standard output may be a file, and disappears.
    """
    stream = sys.stderr
    if not _is_terminal(stream) or _shows_no_bars(os.environ):
        yield
        return
    over, began = threading.Event(), time.monotonic()

    def show() -> None:
        while True:
            line = f"{text}: {duration(time.monotonic() - began)}"
            with suppress(OSError, ValueError):
                stream.write(f"\r\x1b[2K{line[: shutil.get_terminal_size().columns - 1]}")
                stream.flush()
            if over.wait(WAITING_SECONDS):
                return

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        with suppress(OSError, ValueError):
            stream.write("\r\x1b[2K")
            stream.flush()


class TimedReporter(Reporter):
    """Keeps the times that its subclasses show."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` returns the current time in seconds."""
        self.clock = clock
        self.tasks: Sequence[str] = ()
        self.steps = 0
        """Of the current task."""
        self.forecast = Forecast(Work((), {}, ()), clock)

    @override
    def run_started(self, tasks: Sequence[str], ranks: int, work: Work | None = None) -> None:
        self.tasks = tasks
        self.forecast = Forecast(work or Work((), {}, ()), self.clock)

    @override
    def task_started(self, index: int, name: str, steps: int) -> None:
        self.steps = steps
        self.forecast.task_started(index, steps)

    @override
    def step(self, step: int, loss: float, tokens_per_second: float, lr: float) -> None:
        self.forecast.stepped(step)

    @override
    def evaluating(self, name: str, samples: int = 0, later: int = 0) -> None:
        self.forecast.scoring(name, samples, later)

    @override
    def evaluated(self, done: int, samples: int) -> None:
        self.forecast.scored(done)

    @override
    def task_finished(self, index: int, row: Row) -> None:
        self.forecast.task_finished()

    def task_left(self) -> str:
        """`80 s left`, or nothing if it is not known yet."""
        return _left(self.forecast.task_left())

    def scoring_left(self) -> str:
        """The same for the evaluation that runs now."""
        return _left(self.forecast.scoring_left())

    def run_left(self) -> str:
        """The same for the whole run."""
        return _left(self.forecast.run_left() if self.forecast.work.steps else None)


def _left(seconds: float | None) -> str:
    return "" if seconds is None else f"{duration(seconds)} left"


class LineReporter(TimedReporter):
    """Prints plain lines, few enough for a log file."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` returns the current time in seconds."""
        super().__init__(clock)
        self.stream = stream
        self.last: tuple[int, float] = (0, 0.0)
        """Step and time of the last line."""
        self.gap = LINE_SECONDS
        """Seconds from that line to the next."""
        self._over = threading.Event()
        """Set when the current phase is over."""
        self._in_row = False
        """Whether a row of the matrix has begun."""

    @override
    def phase(self, text: str) -> None:
        self.message(text)
        self.working(text)

    @override
    def working(self, text: str) -> None:
        self._over.set()
        self._over = threading.Event()
        threading.Thread(target=self._report_again, args=(text, self._over), daemon=True).start()

    def _report_again(self, text: str, over: threading.Event) -> None:
        """What a thread does: report something that takes long."""
        began, pause = self.clock(), PHASE_SECONDS
        while not over.wait(pause):
            pause = self.clock() - began
            with suppress(OSError, ValueError):
                self.stream.write(f"  still {text[:1].lower()}{text[1:]}: {duration(pause)}\n")
                self.stream.flush()

    @override
    def run_started(self, tasks: Sequence[str], ranks: int, work: Work | None = None) -> None:
        super().run_started(tasks, ranks, work)
        self.message(f"{count(len(tasks), 'task')} on {count(ranks, 'rank')}: {listed(tasks, MOST_NAMED)}")

    @override
    def task_started(self, index: int, name: str, steps: int) -> None:
        super().task_started(index, name, steps)
        self.last, self.gap, self._in_row = (0, self.clock()), LINE_SECONDS, False
        self.message(f"task {index + 1}/{len(self.tasks)} {name}: {count(steps, 'step')}")

    @override
    def step(self, step: int, loss: float, tokens_per_second: float, lr: float) -> None:
        super().step(step, loss, tokens_per_second, lr)
        self._over.set()
        tenth = 10 * step // self.steps > 10 * self.last[0] // self.steps
        if self._is_due(step) or tenth:
            self.last = (step, self.clock())
            parts = (
                f"step {step}/{self.steps}",
                *step_details(loss, tokens_per_second, lr),
                self._left(self.task_left()),
            )
            self.message("  " + "  ".join(filter(None, parts)))

    def _left(self, own: str) -> str:
        whole = self.run_left()
        return f"{own}, run {whole}" if own and whole else own

    def _is_due(self, number: int) -> bool:
        """Whether it is time for the next line; then it is about `number`."""
        now = self.clock()
        if now - self.last[1] < self.gap:
            return False
        self.last, self.gap = (number, now), min(MOST_LINE_SECONDS, self.gap * LINE_GROWTH)
        return True

    @override
    def evaluating(self, name: str, samples: int = 0, later: int = 0) -> None:
        super().evaluating(name, samples, later)
        self._over.set()
        # In a long stream, a line for every task of every row would be too many.
        if self._in_row and not self._is_due(0):
            return
        self.last, self._in_row = (0, self.clock()), True
        rest = f", and {later} of the tasks after it" if later else ""
        self.message(f"  evaluating {name}" + (f": {count(samples, 'sample')}{rest}" if samples else ""))

    @override
    def evaluated(self, done: int, samples: int) -> None:
        super().evaluated(done, samples)
        self._over.set()
        if self._is_due(done):
            self.message("  ".join(filter(None, (f"    {done}/{samples}", self._left(self.scoring_left())))))

    @override
    def task_finished(self, index: int, row: Row) -> None:
        super().task_finished(index, row)
        self._in_row = False
        self.message(task_scores(index, self.tasks, row))

    @override
    def message(self, text: str) -> None:
        self._over.set()
        self.stream.write(f"{text}\n")
        self.stream.flush()

    @override
    def run_finished(self, metrics: Mapping[str, Any]) -> None:
        self.message(format_summary(metrics))

    @override
    def close(self) -> None:
        self._over.set()


class UnfailingReporter(Reporter):
    """Wraps a reporter and absorbs its errors: after the first, plain lines replace a bar; after the second, nothing.

    Args:
        reporter: The reporter to use until it fails.
        stream: Where the plain lines go.
    """

    def __init__(self, reporter: Reporter, stream: TextIO) -> None:
        self.reporter, self._stream = reporter, stream
        self._task: tuple[int, str, int] | None = None

    @override
    def phase(self, text: str) -> None:
        self._try("phase", text)

    @override
    def working(self, text: str) -> None:
        self._try("working", text)

    @override
    def run_started(self, tasks: Sequence[str], ranks: int, work: Work | None = None) -> None:
        self._try("run_started", tasks, ranks, work)

    @override
    def task_started(self, index: int, name: str, steps: int) -> None:
        self._task = (index, name, steps)
        self._try("task_started", index, name, steps)

    @override
    def step(self, step: int, loss: float, tokens_per_second: float, lr: float) -> None:
        self._try("step", step, loss, tokens_per_second, lr)

    @override
    def evaluating(self, name: str, samples: int = 0, later: int = 0) -> None:
        self._try("evaluating", name, samples, later)

    @override
    def evaluated(self, done: int, samples: int) -> None:
        self._try("evaluated", done, samples)

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
        if isinstance(failed, TimedReporter) and not isinstance(failed, LineReporter):
            self.reporter = LineReporter(self._stream)
            self.reporter.tasks, self.reporter.forecast = failed.tasks, failed.forecast
            self.message(f"no progress bar from here on: {type(error).__name__}: {error}")
            if self._task is not None:
                self.task_started(*self._task)


def format_matrix(tasks: Sequence[str], matrix: Sequence[Row], columns: int | None = None) -> str:
    """The accuracy matrix as a table: the first row before training, then one row per trained task; `-` means not
    evaluated. For a long stream: each task's score right after its own training and its latest score.

    A table that is wider than `columns` is printed in several parts, each with some of the tasks.
    """
    if len(tasks) > WIDEST_MATRIX:
        return _format_long(tasks, matrix)
    labels = ["before", *(f"after {name}" for name in tasks)][: len(matrix)]
    left = max(map(len, labels), default=0)
    widths = [max(len(name), 6) for name in tasks]
    parts = []
    for part in _parts(widths, None if columns is None else columns - left):
        header = " " * left + "".join(f"  {tasks[place]:>{widths[place]}}" for place in part)
        rows = (
            f"{label:<{left}}" + "".join(f"  {_score(row[place]):>{widths[place]}}" for place in part)
            for label, row in zip(labels, matrix, strict=True)
        )
        parts.append("\n".join([header, *rows]))
    return "\n\n".join(parts)


def _parts(widths: Sequence[int], room: int | None) -> list[range]:
    """Successive columns of these widths that fit side by side into `room`, at least one in each part."""
    parts, begin, taken = [], 0, 0
    for place, width in enumerate(widths):
        if room is not None and taken + 2 + width > room and place > begin:
            parts.append(range(begin, place))
            begin, taken = place, 0
        taken += 2 + width
    return [*parts, range(begin, len(widths))]


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


def format_summary(metrics: Mapping[str, Any], columns: int | None = None) -> str:
    """The summary of a run: the matrix in at most `columns`, a line per metric, and notes on the scores."""
    width = max(map(len, SUMMARY.values()))
    lines = []
    for key, name in SUMMARY.items():
        value = metrics.get(key)
        shown = f"{value:.0f}" if key == "tokens_per_second" and value is not None else _score(value)
        lines.append(f"{name:<{width}}  {shown}")
    matrix = format_matrix(metrics["tasks"], metrics["accuracy_matrix"], columns)
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


def task_scores(index: int, tasks: Sequence[str], row: Row) -> str:
    """A row of the matrix in a line: `after a: a 0.7500, b 0.5000`. If it is long, the task's own score comes first."""
    scores = [f"{name} {_score(score)}" for name, score in zip(tasks, row, strict=True) if score is not None]
    own = f"{tasks[index]} {_score(row[index])}"
    if len(scores) > MOST_NAMED and own in scores:
        scores.remove(own)
        scores.insert(0, own)
    return f"after {tasks[index]}: {listed(scores, MOST_NAMED)}"


def step_details(loss: float, tokens_per_second: float, lr: float) -> list[str]:
    """The figures of a step: `loss 0.5000`, `100 tokens/s`, `lr 0.001`."""
    return [f"loss {loss:.4f}", f"{tokens_per_second:.0f} tokens/s", f"lr {lr:.2g}"]


def count(number: int, noun: str) -> str:
    """A number and what it counts: `1 rank`, `2 ranks`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
