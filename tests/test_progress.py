from __future__ import annotations

import fcntl
import os
import struct
import termios
from io import StringIO

import pytest
from rich.console import Console

from cl_dist.progress import (
    BarReporter,
    LineReporter,
    Reporter,
    UnfailingReporter,
    different_scores,
    format_matrix,
    format_summary,
    make_reporter,
    score_names,
    score_notes,
)

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
    reporter.run_started(METRICS["tasks"], ranks=2)  # type: ignore[arg-type]
    for index, name in enumerate(("spring", "a-long-name")):
        reporter.task_started(index, name, steps=2)
        for step in (1, 2):
            reporter.step(step, loss=0.5, tokens_per_second=100.0, lr=1e-3)
        reporter.evaluating(name)
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
    assert lines[:6] == [
        "2 tasks on 2 ranks: spring, a-long-name",
        "task 1/2 spring: 2 steps",
        "  step 1/2  loss 0.5000  100 tokens/s  lr 0.001",
        "  step 2/2  loss 0.5000  100 tokens/s  lr 0.001  0 s left",
        "  evaluating spring",
        "after spring: spring 0.7500",
    ]
    assert "[bold]printed verbatim[/bold]" in lines
    assert stream.getvalue().endswith(SUMMARY)


@pytest.mark.parametrize(("seconds", "steps"), [(0.0, list(range(100, 1001, 100))), (6.0, list(range(1, 1001)))])
def test_a_line_is_due_at_every_tenth_and_every_few_seconds(seconds: float, steps: list[int]) -> None:
    stream, clock = StringIO(), Clock()
    reporter = LineReporter(stream, clock)
    reporter.task_started(0, "spring", steps=1000)
    for step in range(1, 1001):
        clock.now += seconds
        reporter.step(step, 0.5, 100.0, 1e-3)
    shown = [int(line.split()[1].split("/")[0]) for line in stream.getvalue().splitlines()[1:]]
    assert shown == steps


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
    assert "loss 0.5000  100 tokens/s" in text
    assert "evaluating a-long-name" in text
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
