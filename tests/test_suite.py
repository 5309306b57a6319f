"""What the other tests stand on: ranks that are forked, and the order and the output of the suite."""

from __future__ import annotations

import io

import pytest
from _pytest.terminal import TerminalReporter

from tests.conftest import LONGEST, TOGETHER, FailuresAtOnce
from tests.ranks import REPOSITORY, RankFailed, run_ranks


def test_ranks_are_processes_with_the_environment_of_a_launcher() -> None:
    first, second = run_ranks("os:getpid", 2)
    assert first != second
    assert run_ranks("os:getenv", 2, {"key": "RANK"}) == ["0", "1"]
    assert run_ranks("os:getenv", 1, {"key": "COLOUR"}, environment={"COLOUR": "red"}) == ["red"]
    assert run_ranks("os:getenv", 1, {"key": "COLOUR"}) == [None]


def test_a_rank_that_fails_is_quoted() -> None:
    with pytest.raises(RankFailed, match=r"(?s)rank 0 of 1 failed .*JSONDecodeError: Expecting property name"):
        run_ranks("json:loads", 1, {"s": "{"})


def test_a_rank_that_takes_too_long_is_killed() -> None:
    with pytest.raises(RankFailed, match=r"took more than 0\.5 s \(exit codes \[-9\]\)"):
        run_ranks("subprocess:run", 1, {"args": ["sleep", "600"]}, timeout=0.5)


def test_a_failure_is_printed_when_it_happens(request: pytest.FixtureRequest) -> None:
    paper = io.StringIO()
    failures = FailuresAtOnce(TerminalReporter(request.config, paper))
    place = ("test_a.py", 1, "test_b")
    for outcome in ("passed", "failed"):
        text = f"at the start of what {outcome}\n" + 100 * "\n" + f"at the end of what {outcome}"
        report = pytest.TestReport("test_a.py::test_b", place, {}, outcome, text, "call")  # type: ignore[arg-type]
        failures.pytest_runtest_logreport(report)
    assert "test_a.py::test_b (call)" in paper.getvalue()
    assert "at the end of what failed" in paper.getvalue()
    assert "at the start" not in paper.getvalue()
    assert "passed" not in paper.getvalue()


def test_the_files_that_come_first_exist() -> None:
    assert [path for path in (*LONGEST, *TOGETHER) if not (REPOSITORY / path).exists()] == []
