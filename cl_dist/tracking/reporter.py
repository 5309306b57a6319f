"""Turns what a run reports into the values that trackers get."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from typing_extensions import override

from cl_dist.config.load import to_dict
from cl_dist.config.schema import Recipe
from cl_dist.errors import Interrupted
from cl_dist.evaluation.metrics import all_metrics
from cl_dist.progress import Reporter, Row
from cl_dist.state.atomic import write_json
from cl_dist.state.ledger import Ledger
from cl_dist.time_left import Work
from cl_dist.tracking.feed import Feed
from cl_dist.tracking.tracker import RunFacts, make_tracker

IDENTITIES = "tracking.json"
"""File in the run folder: what identifies the run to each tracker, for a resume."""
MATRIX = "accuracy_matrix"


@contextmanager
def tracked(recipe: Recipe, ledger: Ledger, reporter: Reporter) -> Iterator[Reporter]:
    """The reporter, and trackers that get what it reports inside the context; only the rank that writes has any."""
    if not recipe.track or not ledger.writer:
        yield reporter
        return
    both = TrackedReporter(recipe, ledger, reporter)
    status = "failed"
    try:
        yield both
        status = "finished"
    except Interrupted:
        status = "interrupted"
        raise
    finally:
        both.finish(status)


class TrackedReporter(Reporter):
    """Passes every report on, and the numbers among them to trackers too.

    A tracker that fails is left alone from then on, with one message and one line in the log.

    Args:
        recipe: Names the trackers.
        ledger: Has the run folder, and what the manifest knows.
        reporter: The reporter for the user.
    """

    def __init__(self, recipe: Recipe, ledger: Ledger, reporter: Reporter) -> None:
        self._ledger, self._reporter = ledger, reporter
        self._steps: tuple[int, ...] = ()
        self._task, self._step = 0, 0
        self._identities = _read(ledger.folder.path / IDENTITIES)
        settings = to_dict(recipe)
        self._feeds = [
            Feed(
                name,
                partial(make_tracker, name),
                RunFacts(ledger.folder.path, settings, self._identities.get(name)),
                partial(self._remember, name),
            )
            for name in recipe.track
        ]
        self._silent: set[str] = set()

    @override
    def run_started(self, tasks: Sequence[str], ranks: int, work: Work | None = None) -> None:
        self._steps = work.steps if work is not None else ()
        self._reporter.run_started(tasks, ranks, work)

    @override
    def task_started(self, index: int, name: str, steps: int) -> None:
        self._task, self._step = index, sum(self._steps[:index])
        self._reporter.task_started(index, name, steps)

    @override
    def step(self, step: int, loss: float, tokens_per_second: float, lr: float) -> None:
        self._step = sum(self._steps[: self._task]) + step
        values = {"train/loss": loss, "train/learning_rate": lr, "train/tokens_per_second": tokens_per_second}
        self._scalars({**values, "train/task": float(self._task + 1)})
        self._reporter.step(step, loss, tokens_per_second, lr)

    @override
    def task_finished(self, index: int, row: Row) -> None:
        manifest = self._ledger.manifest
        matrix, done = manifest.accuracy_matrix, index + 1
        self._step = sum(self._steps[:done])  # a resumed run may have no steps left before this
        values: dict[str, float | None] = {
            f"accuracy/{name}": score for name, score in zip(manifest.tasks, row, strict=True)
        }
        # The metrics of the stream so far, as if it ended here.
        so_far = all_metrics([scores[:done] for scores in matrix[: done + 1]])
        values |= {
            f"stream/{name}": so_far[name] for name in ("average_performance", "forgetting", "backward_transfer")
        }
        if index < len(manifest.kept_share):
            values["stream/kept_share"] = manifest.kept_share[index]
        values["stream/restarts"] = float(manifest.restarts)
        self._scalars(values)
        rows = [[place, *scores] for place, scores in zip(("untouched", *manifest.tasks), matrix, strict=False)]
        self._put("table", MATRIX, ["after", *manifest.tasks], rows, self._step)
        self._reporter.task_finished(index, row)

    @override
    def run_finished(self, metrics: Mapping[str, Any]) -> None:
        numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
        self._scalars({f"result/{name}": float(value) for name, value in numbers.items()})
        self._reporter.run_finished(metrics)

    @override
    def phase(self, text: str) -> None:
        self._reporter.phase(text)

    @override
    def working(self, text: str) -> None:
        self._reporter.working(text)

    @override
    def evaluating(self, name: str, samples: int = 0, later: int = 0) -> None:
        self._reporter.evaluating(name, samples, later)

    @override
    def evaluated(self, done: int, samples: int) -> None:
        self._reporter.evaluated(done, samples)

    @override
    def message(self, text: str) -> None:
        self._reporter.message(text)

    @override
    def close(self) -> None:
        self._reporter.close()

    def finish(self, status: str) -> None:
        """Let the trackers finish; `status` as in `Tracker.finish`."""
        for feed in self._feeds:
            feed.finish(status)
        self._warn()

    def _scalars(self, values: Mapping[str, float | None]) -> None:
        """Send the numbers that there are. Trackers draw NaN and infinity in different ways, or fail: no point then."""
        self._put("scalars", {k: v for k, v in values.items() if v is not None and math.isfinite(v)}, self._step)

    def _put(self, call: str, *arguments: Any) -> None:
        for feed in self._feeds:
            feed.put(call, *arguments)
        self._warn()

    def _warn(self) -> None:
        for feed in self._feeds:
            if feed.failure is not None and feed.name not in self._silent:
                self._silent.add(feed.name)
                text = f"no tracking by {feed.name} from here on: {feed.failure}"
                self._reporter.message(text)
                self._ledger.log(event="tracker_failed", tracker=feed.name, message=feed.failure)

    def _remember(self, name: str, identity: str) -> None:
        self._identities = {**self._identities, name: identity}
        write_json(self._ledger.folder.path / IDENTITIES, self._identities)


def _read(path: Path) -> dict[str, str]:
    """The identities; none if the file is missing or damaged: then the trackers begin a new run."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {name: each for name, each in content.items() if isinstance(each, str)} if isinstance(content, dict) else {}
