from __future__ import annotations

import fcntl
import os
import struct
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO, StringIO, TextIOWrapper

import pytest
from rich.cells import cell_len
from rich.console import Console

from cl_dist import progress
from cl_dist.progress import (
    LineReporter,
    Reporter,
    UnfailingReporter,
    different_scores,
    format_matrix,
    format_summary,
    make_reporter,
    score_names,
    score_notes,
    waiting,
)
from cl_dist.progress_bar import BarReporter
from cl_dist.time_left import Work

METRICS = {
    "tasks": ["spring", "a-long-name"],
    "accuracy_matrix": [[0.25, None], [0.75, 0.5], [0.5, 1.0]],
    "average_performance": 0.75,
    "backward_transfer": -0.25,
    "forward_transfer_zero_shot": None,
    "forgetting": 0.25,
    "learning_accuracy": 0.875,
    "tokens_per_second": 1234.5,
}
SUMMARY = """\
                   spring  a-long-name
before             0.2500            -
after spring       0.7500       0.5000
after a-long-name  0.5000       1.0000

average performance (AP)           0.7500
backward transfer (BWT)            -0.2500
forward transfer (FWT, zero-shot)  -
forgetting                         0.2500
learning accuracy                  0.8750
tokens per second                  1234
"""


@pytest.fixture(autouse=True)
def no_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variables by which a notebook is recognised are those of the test."""
    for name in ("OMPI_COMM_WORLD_SIZE", "JPY_PARENT_PID", "PAGER", "GIT_PAGER", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)


class Terminal(StringIO):
    """A stream that claims to be a terminal."""

    def isatty(self) -> bool:
        return True


class Clock:
    """A clock that the test advances."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def report_a_run(reporter: Reporter) -> None:
    """Make the calls that a coordinator makes in a run over two tasks."""
    reporter.phase("building the engine")
    reporter.run_started(METRICS["tasks"], ranks=2)  # type: ignore[arg-type]
    for index, name in enumerate(("spring", "a-long-name")):
        reporter.task_started(index, name, steps=2)
        for step in (1, 2):
            reporter.step(step, loss=0.5, tokens_per_second=100.0, lr=1e-3)
        reporter.evaluating(name, 20, 0)
        reporter.evaluated(20, 20)
        reporter.task_finished(index, [0.75, None])
    reporter.message("[bold]printed verbatim[/bold]")
    reporter.run_finished(METRICS)
    reporter.close()


def test_the_summary_of_a_run() -> None:
    assert format_summary(METRICS) + "\n" == SUMMARY


def test_notes_on_the_scores() -> None:
    scoring = {
        "metric": {"spring": "exact_match", "a-long-name": "rouge_l"},
        "scored_on": {"spring": "train", "a-long-name": "dev"},
        "answers_outside_labels": {"spring": 0},
        "cut_generations": {"a-long-name": 3},
    }
    assert format_summary({**METRICS, **scoring}).removeprefix(SUMMARY[:-1]).splitlines()[1:] == [
        "scores: exact_match, train split: spring",
        "scores: rouge_l, dev split: a-long-name",
        "the metrics are means of different scores: exact_match (spring); rouge_l (a-long-name)",
        "scored on training data: spring",
        "scored on the dev split: a-long-name",
        "generations cut at eval.max_new_tokens in the last evaluation: a-long-name 3",
    ]
    alike = {"metric": dict.fromkeys(METRICS["tasks"], "rouge_l"), "scored_on": dict.fromkeys(METRICS["tasks"], "test")}
    assert format_summary({**METRICS, **alike}) + "\n" == SUMMARY + "scores: rouge_l, test split\n"


def test_a_label_that_is_chosen_and_one_that_is_written_are_different_scores() -> None:
    metric = dict.fromkeys("abc", "exact_match") | {"d": "rouge_l"}
    mode = {"a": "likelihood", "b": "generate", "c": "likelihood", "d": "generate"}
    names = score_names({"metric": metric, "mode": mode})
    assert different_scores(names) == ("exact_match by likelihood (a, c); exact_match by generate (b); rouge_l (d)")
    assert score_names({"metric": metric}) == metric, "an older run, whose modes are not recorded"
    assert (
        different_scores(score_names({"metric": metric | {"d": "exact_match"}, "mode": dict.fromkeys("abcd", "x")}))
        == ""
    )


def test_notes_on_general_ability_labels_and_held_out_samples() -> None:
    general = [{"after": "a", "scores": {"arc": {"metric": "acc_norm"}, "gsm8k": {"metric": "exact_match"}}}]
    found = {
        "general": general,
        "scored_on": {"a": "held-out", "b": "test"},
        "labels_from": {"a": "training answers", "b": "recipe"},
    }
    assert score_notes(found) == [
        "general ability is a mean of different scores: acc_norm (arc); exact_match (gsm8k)",
        "scored on samples held out of the training data: a",
        "labels found in the training answers: a",
    ]
    many = {"labels_from": {f"t{number}": "training answers" for number in range(40)}}
    assert score_notes(many)[0].endswith(", t24 and 15 more")


def test_a_matrix_that_is_not_full_yet() -> None:
    assert format_matrix(["a"], [[0.5]]) == "             a\nbefore  0.5000"


def reporter(stream: StringIO, terminal: int | None = None) -> Reporter:
    """The reporter that rank 0 uses."""
    made = make_reporter(0, stream, terminal)
    assert isinstance(made, UnfailingReporter)
    return made.reporter


def drawn(bars: BarReporter) -> list[str]:
    """The lines of the two bars, as they stand now."""
    shown = StringIO()
    Console(file=shown, width=bars.console.width, color_system=None).print(bars.progress.get_renderable())
    return shown.getvalue().rstrip("\n").splitlines()


@pytest.fixture
def bars_of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., BarReporter]:
    """Make a reporter with bars for a terminal so many columns wide."""
    monkeypatch.setenv("TERM", "xterm-256color")

    def make(columns: int, clock: Clock | None = None) -> BarReporter:
        return BarReporter(Console(file=Terminal(), force_terminal=True, width=columns), clock or Clock())

    return make


@pytest.mark.parametrize("columns", [80, 120])
def test_bars_fit_into_a_line(columns: int, bars_of: Callable[..., BarReporter]) -> None:
    clock, name = Clock(), "a-task-whose-name-is-far-too-long-for-a-line"
    bars = bars_of(columns, clock)
    bars.run_started([name] * 15, 1024, Work((100_000,) * 15, {name: 9000}, ((name,),) * 15))
    bars.task_started(0, name, 100_000)
    for step in (1, 2):
        clock.now += 1.0
        bars.step(step, 0.123456, 123456.0, 1.25e-5)
    lines = drawn(bars)
    bars.close()
    assert len(lines) == 2
    assert all(cell_len(line) <= columns for line in lines)
    for part in ("0/15", "1024 ranks", "18 d 22 h left"):
        assert part in lines[0]
    for part in ("2/100000", "loss 0.1235", "27 h 40 min left"):
        assert part in lines[1]
    assert ("123456 tokens/s  lr 1.3e-05" in lines[1]) == (columns == 120)


@pytest.mark.parametrize(
    ("columns", "details"),
    [(30, ""), (40, ""), (60, "loss 0.5000"), (80, "loss 0.5000 100 tokens/s lr 0.001")],
)
def test_what_a_narrow_terminal_leaves_out(columns: int, details: str, bars_of: Callable[..., BarReporter]) -> None:
    clock = Clock()
    bars = bars_of(columns, clock)
    bars.run_started(["spring", "summer"], 1)
    bars.task_started(1, "summer", 30)
    for step in (1, 2, 3):
        clock.now += 1.0
        bars.step(step, 0.5, 100.0, 1e-3)
    lines = drawn(bars)
    bars.close()
    words = [word for word in lines[1].split() if not set(word) <= set("━╸╺")]
    assert " ".join(words) == f"summer 3/30 27 s left {details}".rstrip()
    assert [cell_len(line) <= columns for line in lines] == [True, True]


def test_bars_stay_where_they_are_from_task_to_task(bars_of: Callable[..., BarReporter]) -> None:
    bars, names = bars_of(80), ["a", "任务", "autumn-of-the-year", "b" * 30]
    bars.run_started(names, 1)
    counts = set()
    for index, name in enumerate(names):
        bars.task_started(index, name, 20)
        bars.step(1, 0.5, 100.0, 1e-3)
        counts.add(cell_len(drawn(bars)[1].split("/20")[0]))
        bars.evaluating(f"{names[0]} to {name}", 20)
        bars.evaluated(12, 20)
        counts.add(cell_len(drawn(bars)[1].split("/20")[0]))
    bars.close()
    assert counts == {len("autumn-of-the-y… ") + 10 + len(" 12")}


def test_after_tasks_that_are_evaluated_together_bars_stay_where_they_are(bars_of: Callable[..., BarReporter]) -> None:
    bars = bars_of(80)
    bars.run_started(["a", "b"], 1)
    bars.evaluating("a to b", 20)
    before = drawn(bars)[1].index(" 0/20")
    bars.task_started(0, "a", 20)
    assert drawn(bars)[1].index(" 0/20") == before
    bars.close()


def test_a_bar_without_a_number_to_come_does_not_show_the_last_one(bars_of: Callable[..., BarReporter]) -> None:
    bars = bars_of(80)
    bars.run_started(["a"], 1)
    bars.task_started(0, "a", 20)
    bars.step(20, 0.5, 100.0, 1e-3)
    assert " 20/20 " in drawn(bars)[1]
    bars.evaluating("gsm8k")
    assert "20" not in drawn(bars)[1]
    assert bars.progress.tasks[1].total is None
    bars.task_started(0, "a", 30)
    assert "  0/30" in drawn(bars)[1]
    bars.close()


def test_a_full_bar_says_what_it_waits_for(bars_of: Callable[..., BarReporter]) -> None:
    bars = bars_of(80)
    bars.run_started(["a"], 1)
    bars.task_started(0, "a", 20)
    bars.step(20, 0.5, 100.0, 1e-3)
    bars.working("saving the state")
    assert drawn(bars)[1].rstrip().endswith("20/20             saving the state")
    bars.step(20, 0.5, 100.0, 1e-3)
    assert "saving" not in drawn(bars)[1]
    bars.close()


def test_names_are_cut_in_the_letters_that_a_terminal_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    raw = BytesIO()
    stream = TextIOWrapper(raw, encoding="ascii", errors="strict", write_through=True)
    bars = BarReporter(Console(file=stream, force_terminal=True, width=60))
    bars.phase("p" * 100)
    bars.run_started(["b" * 40], 1)
    bars.task_started(0, "b" * 40, 20)
    bars.close()
    assert b"bbb... " in raw.getvalue()


def test_the_time_left_of_the_run_stands_behind_that_of_the_task() -> None:
    stream, clock = StringIO(), Clock()
    reporter = LineReporter(stream, clock)
    reporter.run_started(["a", "b"], 1, Work((10, 10), {"a": 30, "b": 30}, (("a",), ("a", "b")), batch=10))
    reporter.task_started(0, "a", 10)
    for step in range(1, 11):
        clock.now += 10.0
        reporter.step(step, 0.5, 100.0, 1e-3)
    # 10 s a step; until scoring is measured, a sample takes as long as in training: 90 samples of 1 s.
    assert stream.getvalue().splitlines()[-1].endswith("lr 0.001  0 s left, run 3 min left")
    reporter.evaluating("a", 30, 0)
    clock.now += 40.0
    reporter.evaluated(20, 30)
    # 2 s a sample, as measured: 10 + 60 of them, and 10 steps.
    assert stream.getvalue().splitlines()[-1] == "    20/30  20 s left, run 4 min left"


def test_a_phase_that_takes_long_is_reported_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PHASE_SECONDS", 0.01)
    stream = StringIO()
    reporter = LineReporter(stream)
    reporter.phase("Loading the model")
    for _ in range(200):
        if "still" in stream.getvalue():
            break
        time.sleep(0.05)
    reporter.message("done")
    lines = stream.getvalue().splitlines()
    assert lines[0] == "Loading the model"
    assert lines[1] == "  still loading the model: 0 s"
    reporter.close()


def test_work_inside_a_task_has_a_line_only_if_it_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = StringIO()
    reporter = LineReporter(stream)
    reporter.working("saving the state")
    assert stream.getvalue() == ""
    monkeypatch.setattr(progress, "PHASE_SECONDS", 0.01)
    for end in (
        lambda: reporter.step(1, 0.5, 100.0, 1e-3),
        lambda: reporter.evaluated(1, 8),
        lambda: reporter.evaluating("a", 8),
        lambda: reporter.working("writing the model"),
        reporter.close,
    ):
        reporter.task_started(0, "a", 1000)
        reporter.working("saving the state")
        over = reporter._over
        for _ in range(200):
            if "  still saving the state: 0 s\n" in stream.getvalue():
                break
            time.sleep(0.05)
        assert "  still saving the state: 0 s\n" in stream.getvalue()
        end()
        assert over.is_set(), "otherwise the thread would go on"
        stream.seek(stream.truncate(0))


def test_a_command_that_prints_at_its_end_shows_that_it_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "12")
    monkeypatch.setattr(progress, "WAITING_SECONDS", 0.01)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with waiting("planning x"):
        for _ in range(200):
            if terminal.getvalue().count("planning") > 2:
                break
            time.sleep(0.05)
    shown, after = terminal.getvalue().split("\r\x1b[2K")[1:-1], terminal.getvalue().split("\r\x1b[2K")[-1]
    assert len(shown) > 2
    assert set(shown) == {"planning x:"}, "cut at the terminal's width"
    assert after == "", "nothing stays"
    for variables, stream in (({"TERM": "dumb"}, Terminal()), ({"JPY_PARENT_PID": "1"}, Terminal()), ({}, StringIO())):
        monkeypatch.setattr(sys, "stderr", stream)
        with monkeypatch.context() as changed, waiting_in(changed, variables):
            pass
        assert stream.getvalue() == ""


@contextmanager
def waiting_in(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> Iterator[None]:
    """`waiting` in another environment."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with waiting("planning x"):
        yield


NO_TERMINALS = [
    {"JPY_PARENT_PID": "17"},
    {"PAGER": "cat", "GIT_PAGER": "cat"},
    {"OMPI_COMM_WORLD_SIZE": "2"},
]


@pytest.mark.parametrize("variables", NO_TERMINALS)
def test_a_notebook_and_mpirun_get_lines_although_they_look_like_a_terminal(
    variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm-color")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert type(reporter(Terminal())) is LineReporter


def test_a_forced_colour_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Notebooks and CI set it for pipes and files too."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("FORCE_COLOR", "1")
    stream = StringIO()
    report_a_run(make_reporter(0, stream))
    assert "\x1b" not in stream.getvalue()
    assert "\r" not in stream.getvalue()


def test_only_the_first_rank_reports_and_a_terminal_gets_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    assert type(reporter(Terminal())) is LineReporter
    monkeypatch.setenv("TERM", "xterm-256color")
    assert isinstance(reporter(Terminal()), BarReporter)
    assert isinstance(reporter(StringIO()), LineReporter)
    for stream in (Terminal(), StringIO()):
        assert type(make_reporter(1, stream)) is Reporter
        report_a_run(make_reporter(1, stream))
        assert stream.getvalue() == ""


def test_lines_of_a_run() -> None:
    stream = StringIO()
    report_a_run(LineReporter(stream, Clock()))
    lines = stream.getvalue().splitlines()
    assert lines[:7] == [
        "building the engine",
        "2 tasks on 2 ranks: spring, a-long-name",
        "task 1/2 spring: 2 steps",
        "  step 1/2  loss 0.5000  100 tokens/s  lr 0.001",
        "  step 2/2  loss 0.5000  100 tokens/s  lr 0.001  0 s left",
        "  evaluating spring: 20 samples",
        "after spring: spring 0.7500",
    ]
    assert "[bold]printed verbatim[/bold]" in lines
    assert stream.getvalue().endswith(SUMMARY)


@pytest.mark.parametrize(
    ("seconds", "steps"),
    [(0.0, list(range(100, 1001, 100))), (1.0, [5, 13, 25, 42, 68, 100, 138, 195, 200])],
)
def test_a_line_is_due_at_every_tenth_and_after_ever_longer_pauses(seconds: float, steps: list[int]) -> None:
    stream, clock = StringIO(), Clock()
    reporter = LineReporter(stream, clock)
    reporter.task_started(0, "spring", steps=1000)
    for step in range(1, 1001):
        clock.now += seconds
        reporter.step(step, 0.5, 100.0, 1e-3)
    shown = [int(line.split()[1].split("/")[0]) for line in stream.getvalue().splitlines()[1:]]
    assert shown[: len(steps)] == steps
    assert len(shown) < 30


def test_the_time_left_is_estimated_from_this_processs_steps() -> None:
    stream, clock = StringIO(), Clock()
    reporter = LineReporter(stream, clock)
    reporter.task_started(0, "spring", steps=100)
    for step, now in ((50, 1000.0), (60, 1020.0)):
        clock.now = now
        reporter.step(step, 0.5, 100.0, 1e-3)
    assert stream.getvalue().splitlines()[-1].endswith("80 s left")


def test_bars_of_a_run_leave_the_terminal_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    stream = Terminal()
    report_a_run(BarReporter(Console(file=stream, force_terminal=True, width=120)))
    text = stream.getvalue()
    assert "2/2" in text
    assert "evaluating" in text
    assert "building the engine" in text
    assert "[bold]printed verbatim[/bold]" in text
    assert text.rstrip("\n").endswith(SUMMARY.splitlines()[-1])
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor is shown again


def test_behind_a_pipe_bars_have_the_terminals_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    master, slave = os.openpty()
    stream = StringIO()
    bars = reporter(stream, slave)
    assert isinstance(bars, BarReporter)
    for columns in (123, 1, 0):
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        assert bars.console.size == (columns or 80, 40)
        report_a_run(make_reporter(0, stream, slave))
    assert stream.getvalue().rstrip("\n").endswith(SUMMARY.splitlines()[-1])
    assert "no progress bar from here on" not in stream.getvalue()
    os.close(master)
    assert bars.console.size == (80, 25) or bars.console.size == (80, 40)
    os.close(slave)
    assert bars.console.size == (80, 25)


class Fussy(Terminal):
    """A terminal that rejects escape sequences."""

    def write(self, text: str) -> int:
        if "\x1b" in text:
            raise UnicodeEncodeError("ascii", text, 0, 1, "no such character")
        return super().write(text)


def test_lines_replace_a_bar_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    stream = Fussy()
    report_a_run(make_reporter(0, stream))
    assert stream.getvalue().startswith("no progress bar from here on: UnicodeEncodeError")
    assert "step 2/2  loss 0.5000" in stream.getvalue()
    assert stream.getvalue().endswith(SUMMARY)


def test_a_closed_stream_is_not_an_error() -> None:
    stream = StringIO()
    stream.close()
    report_a_run(make_reporter(0, stream))


def test_a_table_that_is_wider_than_the_terminal_comes_in_parts() -> None:
    tasks, matrix = ["a", "b-is-longer", "c"], [[0.25, None, 0.5], [0.75, 0.5, 1.0]]
    whole = format_matrix(tasks, matrix)
    assert format_matrix(tasks, matrix, max(map(len, whole.splitlines()))) == whole
    parts = """\
               a  b-is-longer
before    0.2500            -
after a   0.7500       0.5000

               c
before    0.5000
after a   1.0000"""
    narrow = format_matrix(tasks, matrix, len(whole.splitlines()[0]) - 1)
    assert narrow == parts.replace("before    ", "before   ").replace("after a   ", "after a  ").replace(
        "   " * 5, " " * 14
    )
    assert len(format_matrix(tasks, matrix, 1).split("\n\n")) == 3


def test_a_stream_of_many_tasks_has_short_lines() -> None:
    stream, names = StringIO(), [f"task-{number}" for number in range(100)]
    reporter = LineReporter(stream, Clock())
    reporter.run_started(names, 1)
    reporter.task_finished(98, [0.5] * 98 + [0.75, None])
    started, finished = stream.getvalue().splitlines()
    assert started.endswith(" task-24 and 75 more")
    assert finished.startswith("after task-98: task-98 0.7500, task-0 0.5000, ")
    assert finished.endswith(" task-23 0.5000 and 74 more")


def test_a_long_row_has_a_line_now_and_then() -> None:
    stream, clock = StringIO(), Clock()
    reporter = LineReporter(stream, clock)
    reporter.task_started(0, "a", 1)
    for number in range(100):
        reporter.evaluating(f"task-{number}", 10, 10 * (99 - number))
        for done in (5, 10):
            clock.now += 0.5
            reporter.evaluated(done, 10)
    lines = stream.getvalue().splitlines()[1:]
    assert lines[0] == "  evaluating task-0: 10 samples, and 990 of the tasks after it"
    assert 5 < len(lines) < 15
