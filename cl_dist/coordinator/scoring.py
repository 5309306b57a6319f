"""Scores of the model in training (a row of the accuracy matrix, general ability), and of a model on the disk."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from cl_dist.assembly import System, build_saved
from cl_dist.config.schema import Recipe
from cl_dist.config.words import listed
from cl_dist.engine.collective_errors import reporting_lost_ranks
from cl_dist.engine.device import set_matmul_precision
from cl_dist.engine.distributed import join, leave, quiet_libraries
from cl_dist.engine.memory_errors import reporting_exhausted_memory
from cl_dist.errors import ClDistError
from cl_dist.evaluation.general import is_due
from cl_dist.evaluation.result import CUT_GENERATIONS, TaskScore, write_predictions
from cl_dist.heartbeat import beat
from cl_dist.progress import MOST_NAMED, Reporter
from cl_dist.state.atomic import FULL_DISK, DiskFull, raising_disk_full, write_json
from cl_dist.state.ledger import Ledger
from cl_dist.state.run_folder import RunFolder, TaskFolder
from cl_dist.state.scores import How
from cl_dist.tasks.types import Task

Row = tuple[float | None, ...]
"""A score for each task of the stream; None if not evaluated."""
General = tuple[dict[str, Any], ...]
"""Measurements of general ability, as in the manifest."""


def scoring_entry(task: Task, result: TaskScore) -> How:
    """How a task was scored, as recorded in the manifest (`cl_dist.state.manifest.SCORING`)."""
    entry: How = {
        "metric": result.metric,
        "mode": result.mode,
        "scored_on": task.scored_on,
        "samples": result.count,
    }
    if task.labels_from is not None:
        entry |= {"labels_from": task.labels_from, "answers_outside_labels": task.unlisted}
    if CUT_GENERATIONS in result.extras:
        entry[CUT_GENERATIONS] = int(result.extras[CUT_GENERATIONS])
    return entry


def cut_message(tasks: Iterable[str], scoring: Mapping[str, How], most: int) -> str:
    """How many answers were cut in the last evaluation of these tasks; empty if none."""
    counts = {task: scoring.get(task, {}).get(CUT_GENERATIONS) for task in tasks}
    cut = [f"{task} {count} of {scoring[task].get('samples', '?')}" for task, count in counts.items() if count]
    return f"generated answers cut at eval.max_new_tokens ({most}): {listed(cut, MOST_NAMED)}" if cut else ""


class Scoring:
    """Evaluates the model that is being trained (collective).

    Args:
        system: Tasks and evaluators.
        ledger: Logs the scores and writes the predictions.
        reporter: Reports progress.
        stop_if_asked: Called between batches; ends the run with its state saved if a signal asked for it (collective).
    """

    def __init__(self, system: System, ledger: Ledger, reporter: Reporter, stop_if_asked: Callable[[], None]) -> None:
        self._system, self._ledger, self._reporter = system, ledger, reporter
        self._stop_if_asked = stop_if_asked

    def row(self, indices: range, predictions: Path) -> Row:
        """Score the tasks at `indices` of the stream, in order; the other scores are None.

        Scores that an interrupted start has recorded are kept, and every finished pass is recorded.
        """
        row = list(self._ledger.manifest.row_under_way) or [None] * len(self._system.tasks)
        places = {self._system.tasks[index].name: index for index in indices if row[index] is None}
        for tasks in self._system.evaluator.passes([self._system.tasks[index] for index in places.values()]):
            names = tasks[0].name if len(tasks) == 1 else f"{tasks[0].name} to {tasks[-1].name}"
            self._reporter.evaluating(names)
            beat(f"evaluating {names}")
            for result in self._system.evaluator.evaluate(tasks, self._stop_if_asked):
                entry = scoring_entry(self._system.tasks[places[result.task]], result)
                # Predictions and log first: once the ledger has the score, a resume does not compute it again.
                self._record(result, entry, predictions)
                row[places[result.task]] = result.score
                self._ledger.scored(places[result.task], result.score, entry)
        scored = [self._system.tasks[index].name for index in indices]
        if text := cut_message(scored, self._ledger.manifest.scoring, self._system.recipe.eval.max_new_tokens):
            self._reporter.message(f"  {text}")
        return tuple(row)

    def _record(self, result: TaskScore, entry: How, predictions: Path) -> None:
        def write() -> None:
            with raising_disk_full(predictions):
                write_predictions(predictions / f"{result.task}.jsonl", result.predictions)

        self._ledger.write(write)
        extras = {**entry, **result.extras}
        self._ledger.log(
            event="evaluation", folder=predictions.parent.name, task=result.task, score=result.score, **extras
        )

    def general(self, place: str) -> General:
        """All measurements of general ability so far, including one after `place` if the recipe asks for it."""
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
        """The harness's results for one of its tasks, or for each task of a group."""
        assert self._system.general is not None
        self._reporter.evaluating(name)
        beat(f"general ability: {name}")
        scores = {}
        for result in self._system.general.evaluate(name):
            values = dataclasses.asdict(result)
            self._ledger.log(event="general", after=place, **values)
            scores[values.pop("task")] = values
        return scores


def evaluate(recipe: Recipe, recipe_dir: Path, *, task_index: int, reporter: Reporter) -> dict[str, float]:
    """Score the model that the run in `recipe.output_dir` saved after task `task_index`, on every task of the recipe.

    The scores are also written to evaluation.json in the task's folder, and how they were obtained to
    evaluation/scoring.json, unless the folder is read-only. Every rank loads the whole model.

    Raises:
        BadInput: The saved model or the data cannot be used.
        ClDistError: All scores were computed and reported, but could not be written.
    """
    joined = join(recipe.launch.timeout_seconds, recipe.launch.device)
    set_matmul_precision(recipe.train.tf32)
    quiet_libraries(joined.rank)
    if (warning := joined.warning()) is not None:
        reporter.message(warning)
    lost_ranks = reporting_lost_ranks(joined.rank, recipe.launch.timeout_seconds, lambda reason, _: reason)
    with lost_ranks, reporting_exhausted_memory(joined.rank, joined.world, recipe):
        return _evaluate(recipe, recipe_dir, task_index, joined.rank, reporter)


def _evaluate(recipe: Recipe, recipe_dir: Path, task_index: int, rank: int, reporter: Reporter) -> dict[str, float]:
    folder = RunFolder(Path(recipe.output_dir)).task(task_index, recipe.stream.tasks[task_index].name)
    store = _Store(folder, reporter) if rank == 0 else None
    beat("loading the saved model")
    tasks, evaluator, notices = build_saved(recipe, recipe_dir, folder.model)
    for notice in notices:
        if notice.on_screen:
            reporter.message(notice.text)
    by_name = {task.name: task for task in tasks}
    scores: dict[str, float] = {}
    how: dict[str, How] = {}
    beat(f"evaluating the model after task {folder.path.name}")
    for result in chain.from_iterable(map(evaluator.evaluate, evaluator.passes(tasks))):
        scores[result.task] = result.score
        how[result.task] = scoring_entry(by_name[result.task], result)
        cut = how[result.task].get(CUT_GENERATIONS)
        reporter.message(
            f"{result.task}: {result.score:.4f} ({result.metric} of {result.count} "
            f"{by_name[result.task].scored_on} samples, by {result.mode}"
            + (f"; {cut} cut at eval.max_new_tokens, {recipe.eval.max_new_tokens})" if cut else ")")
        )
        if store is not None:
            store.keep(result)
    # Only rank 0 may fail from here on, so release the other ranks first.
    leave()
    if store is not None:
        store.finish(scores, how)
    return scores


class _Store:
    """Writes predictions and scores into a task's folder. A failure does not stop the evaluation; `finish` raises it.

    Args:
        folder: The task's folder.
        reporter: Reports that the folder is read-only.
    """

    def __init__(self, folder: TaskFolder, reporter: Reporter) -> None:
        self._folder, self._failure = folder, ""
        self._writable = _can_write(folder.path)
        if not self._writable:
            reporter.message(f"{folder.path} is not writable: scores and predictions are shown, but not stored")

    def keep(self, result: TaskScore) -> None:
        """Write a task's predictions."""
        path = self._folder.path / "evaluation" / f"{result.task}.jsonl"
        self._try(path, lambda: write_predictions(path, result.predictions))

    def finish(self, scores: dict[str, float], how: dict[str, How]) -> None:
        """Write the scores, and how they were obtained; raises ClDistError if anything could not be written."""
        details = self._folder.path / "evaluation" / "scoring.json"
        self._try(details, lambda: write_json(details, how))
        path = self._folder.path / "evaluation.json"
        self._try(path, lambda: write_json(path, scores))
        if self._failure:
            raise ClDistError(f"{self._failure}; the scores above are complete, but not all of them are stored")

    def _try(self, path: Path, write: Callable[[], None]) -> None:
        if not self._writable or self._failure:
            return
        try:
            with raising_disk_full(path):
                write()
        except DiskFull as error:
            self._failure = f"no space left on the disk of {error.path}"
        except OSError as error:
            self._failure = f"{path} cannot be written: {error.strerror}"


def _can_write(folder: Path) -> bool:
    """Whether files can be created in a folder; finds missing permissions and read-only mounts."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError as error:
        return error.errno in FULL_DISK  # a full disk is reported by the first write that fails
