"""A tracker that hangs, fails or falls behind costs a run nothing but its values."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from typing_extensions import override

from cl_dist.tracking import feed
from cl_dist.tracking.feed import Feed
from cl_dist.tracking.tracker import RunFacts, Tracker

FACTS = RunFacts(Path(), {}, None)


class Slow(Tracker):
    """Keeps what it gets, each value once `go` is set."""

    def __init__(self, go: threading.Event) -> None:
        self.go, self.got = go, list[Any]()

    @override
    def start(self, run: RunFacts) -> str | None:
        return "seven"

    @override
    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self.go.wait()
        if step < 0:
            raise SystemExit("no such step")
        self.got.append((step, dict(values)))

    @override
    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        self.got.append((step, name))

    @override
    def finish(self, status: str) -> None:
        self.got.append(status)


@pytest.fixture
def go() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()  # lets the threads of failed tests end


def test_values_arrive_in_order(go: threading.Event) -> None:
    tracker, started = Slow(go), list[str]()
    one = Feed("slow", lambda: tracker, FACTS, started.append)
    one.put("scalars", {"loss": 1.0}, 1)
    one.put("table", "matrix", ["a"], [[1]], 2)
    assert tracker.got == [], "put did not wait for it"
    go.set()
    one.finish("interrupted")
    assert tracker.got == [(1, {"loss": 1.0}), (2, "matrix"), "interrupted"]
    assert (one.failure, started) == (None, ["seven"])


def test_one_that_hangs_is_left_behind(go: threading.Event) -> None:
    one = Feed("slow", lambda: Slow(go), FACTS, lambda _: None)
    one.put("scalars", {"loss": 1.0}, 1)
    one.finish("finished", seconds=0.1)
    assert one.failure == "it did not finish within 0.1 s"


def test_one_that_falls_behind_is_given_up(go: threading.Event, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "WAITING", 3)
    one = Feed("slow", lambda: Slow(go), FACTS, lambda _: None)
    for step in range(1, 6):
        one.put("scalars", {"loss": 1.0}, step)
    assert one.failure == "3 values are waiting for it"
    one.finish("finished")


def test_one_that_raises_anything_says_what(go: threading.Event) -> None:
    go.set()
    one = Feed("slow", lambda: Slow(go), FACTS, lambda _: None)
    one.put("scalars", {}, -1)
    one.finish("finished")
    assert one.failure == "SystemExit: no such step"
