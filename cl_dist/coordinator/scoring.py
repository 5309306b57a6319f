"""Scores of the run's model, after a task or before all: a row of the accuracy matrix, and general ability."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cl_dist.assembly import System
from cl_dist.evaluation.general import is_due
from cl_dist.evaluation.result import CUT_GENERATIONS, TaskScore, write_predictions
from cl_dist.heartbeat import beat
from cl_dist.progress import Reporter
from cl_dist.state.atomic import telling_full_disk
from cl_dist.state.ledger import Ledger
from cl_dist.state.scores import How
from cl_dist.tasks.types import Task

Row = tuple[float | None, ...]
"""A score for each task of the stream; None where it was not evaluated."""
General = tuple[dict[str, Any], ...]
"""As the manifest has it."""


def scoring_entry(task: Task, result: TaskScore) -> How:
    """How a task was scored, as the manifest keeps it (`cl_dist.state.manifest.SCORING`)."""
    entry: How = {"metric": result.metric, "scored_on": task.scored_on}
    if task.labels_from is not None:
        entry |= {"labels_from": task.labels_from, "answers_outside_labels": task.unlisted}
    if CUT_GENERATIONS in result.extras:
        entry[CUT_GENERATIONS] = int(result.extras[CUT_GENERATIONS])
    return entry


class Scoring:
    """Evaluates the model that is being trained (collective).

    Args:
        system: Tasks and evaluators.
        ledger: Where scores are logged and predictions written.
        reporter: Where progress is told.
        stop_if_asked: Called now and then; leaves the run in good order where a signal asked for it (collective).
    """

    def __init__(self, system: System, ledger: Ledger, reporter: Reporter, stop_if_asked: Callable[[], None]) -> None:
        self._system, self._ledger, self._reporter = system, ledger, reporter
        self._stop_if_asked = stop_if_asked

    def row(self, indices: range, predictions: Path) -> Row:
        """Score the tasks at `indices`, in the order of the stream; None for the others. What an interrupted start has
        scored already stays, and so does every pass over tasks that is finished.
        """
        row = list(self._ledger.manifest.row_under_way) or [None] * len(self._system.tasks)
        places = {self._system.tasks[index].name: index for index in indices if row[index] is None}
        for tasks in self._system.evaluator.passes([self._system.tasks[index] for index in places.values()]):
            for result in self._pass(tasks):
                entry = scoring_entry(self._system.tasks[places[result.task]], result)
                self._record(result, entry, predictions)
                row[places[result.task]] = result.score
                self._ledger.scored(places[result.task], result.score, entry)
        return tuple(row)

    def _pass(self, tasks: Sequence[Task]) -> list[TaskScore]:
        names = tasks[0].name if len(tasks) == 1 else f"{tasks[0].name} to {tasks[-1].name}"
        self._reporter.evaluating(names)
        beat(f"evaluating {names}")
        return self._system.evaluator.evaluate(tasks, self._stop_if_asked)

    def _record(self, result: TaskScore, entry: How, predictions: Path) -> None:
        def write() -> None:
            with telling_full_disk(predictions):
                write_predictions(predictions / f"{result.task}.jsonl", result.predictions)

        self._ledger.write(write)
        extras = {"mode": result.mode, "samples": result.count, **entry, **result.extras}
        self._ledger.log(
            event="evaluation", folder=predictions.parent.name, task=result.task, score=result.score, **extras
        )

    def general(self, place: str) -> General:
        """All measurements of general ability so far, with the one after `place` where the recipe wants one."""
        before, config = self._ledger.manifest.general, self._system.recipe.eval.general
        if config is None or not is_due(config, place, self._ledger.manifest.tasks):
            return before
        for name in config.tasks:
            done = self._ledger.manifest.general_under_way
            if name not in done:
                self._stop_if_asked()
                self._ledger.update(general_under_way={**done, name: self._general_scores(name, place)})
        scores = {
            task: values for found in self._ledger.manifest.general_under_way.values() for task, values in found.items()
        }
        return (*before, {"after": place, "scores": scores})

    def _general_scores(self, name: str, place: str) -> dict[str, Any]:
        """What the harness finds for one of its tasks, or for each task of a group."""
        assert self._system.general is not None
        self._reporter.evaluating(name)
        beat(f"general ability: {name}")
        scores = {}
        for result in self._system.general.evaluate(name):
            values = dataclasses.asdict(result)
            self._ledger.log(event="general", after=place, **values)
            scores[values.pop("task")] = values
        return scores
