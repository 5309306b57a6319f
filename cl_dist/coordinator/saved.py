"""Scoring a model that a run has saved."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from itertools import chain
from pathlib import Path

from cl_dist.assembly import build_saved
from cl_dist.config.schema import Recipe
from cl_dist.engine.distributed import join, leave, quiet_libraries
from cl_dist.errors import ClDistError
from cl_dist.evaluation.result import TaskScore, write_predictions
from cl_dist.progress import Reporter
from cl_dist.state.atomic import FULL_DISK, DiskFull, telling_full_disk, write_json
from cl_dist.state.run_folder import RunFolder, TaskFolder


def evaluate(recipe: Recipe, recipe_dir: Path, *, task_index: int, reporter: Reporter) -> dict[str, float]:
    """Score the model that the run in `recipe.output_dir` saved after task `task_index`, on every task of the recipe.

    The scores are also written to evaluation.json in the task's folder, unless the run is read-only. The model is
    loaded whole on every rank.

    Raises:
        BadInput: The saved model or the data is not usable.
        ClDistError: All scores were computed and shown, but could not be written.
    """
    rank, _ = join(recipe.launch.timeout_seconds)
    quiet_libraries(rank)
    folder = RunFolder(Path(recipe.output_dir)).task(task_index, recipe.stream.tasks[task_index].name)
    store = _Store(folder, reporter) if rank == 0 else None
    tasks, evaluator, notices = build_saved(recipe, recipe_dir, folder.model)
    for notice in notices:
        if notice.on_screen:
            reporter.message(notice.text)
    split = {task.name: task.scored_on for task in tasks}
    scores: dict[str, float] = {}
    for result in chain.from_iterable(map(evaluator.evaluate, evaluator.passes(tasks))):
        scores[result.task] = result.score
        reporter.message(
            f"{result.task}: {result.score:.4f} ({result.metric} of {result.count} {split[result.task]} samples, "
            f"by {result.mode})"
        )
        if store is not None:
            store.keep(result)
    leave()
    if store is not None:
        store.finish(scores)
    return scores


class _Store:
    """Writes predictions and scores into a task's folder; a failure there stops nothing and is reported at the end.

    Args:
        folder: Of the task.
        reporter: Says that the folder is read-only, where it is.
    """

    def __init__(self, folder: TaskFolder, reporter: Reporter) -> None:
        self._folder, self._failure = folder, ""
        self._writable = _can_write(folder.path)
        if not self._writable:
            reporter.message(f"{folder.path} cannot be written to: scores and predictions are shown, but not stored")

    def keep(self, result: TaskScore) -> None:
        """Write a task's predictions."""
        path = self._folder.path / "evaluation" / f"{result.task}.jsonl"
        self._try(path, lambda: write_predictions(path, result.predictions))

    def finish(self, scores: dict[str, float]) -> None:
        """Write the scores; `ClDistError` where anything could not be written."""
        path = self._folder.path / "evaluation.json"
        self._try(path, lambda: write_json(path, scores))
        if self._failure:
            raise ClDistError(f"{self._failure}; the scores above are complete, but not all of them are stored")

    def _try(self, path: Path, write: Callable[[], None]) -> None:
        if not self._writable or self._failure:
            return
        try:
            with telling_full_disk(path):
                write()
        except DiskFull as error:
            self._failure = f"no space left on the disk of {error.path}"
        except OSError as error:
            self._failure = f"{path} cannot be written: {error.strerror}"


def _can_write(folder: Path) -> bool:
    """Whether a file can be made in a folder: permissions and read-only mounts show there."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError as error:
        return error.errno in FULL_DISK  # reported when something is written
