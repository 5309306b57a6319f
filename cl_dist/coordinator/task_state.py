"""Saves the state of the current task so that a kill cannot damage it, and restores the latest state that is intact."""

from __future__ import annotations

import dataclasses
import shutil
import time
from pathlib import Path
from typing import Any

from cl_dist.assembly import System
from cl_dist.engine.stop import Deadline
from cl_dist.heartbeat import beat
from cl_dist.methods.protocol import TaskPlace
from cl_dist.models.export import is_readable_export
from cl_dist.progress import Reporter
from cl_dist.state.checkpoints import Checkpoints
from cl_dist.state.integrity import CheckpointDamaged
from cl_dist.state.ledger import Ledger
from cl_dist.state.manifest import CheckpointEntry
from cl_dist.state.snapshot import load_snapshot, require_intact, save_snapshot


@dataclasses.dataclass
class Spent:
    """What training a task has taken so far, over all restarts."""

    train_seconds: float = 0.0
    steps: int = 0
    tokens: int = 0
    skipped: int = 0
    """Steps that updated nothing (`train.max_skipped_steps`)."""


class TaskLost(CheckpointDamaged):
    """The end state of the completed task `index` is damaged, but the state that the task started from is intact."""

    def __init__(self, message: str, index: int) -> None:
        super().__init__(message)
        self.index = index


class TaskState:
    """Saves and restores model, optimiser and methods (collective).

    Args:
        system: Tasks and engine.
        ledger: Records what is saved.
        reporter: Reports progress.
        deadline: Measures how long a save takes.
    """

    def __init__(self, system: System, ledger: Ledger, reporter: Reporter, deadline: Deadline) -> None:
        self._engine, self._tasks, self._recipe = system.engine, system.tasks, system.recipe
        self._ledger, self._folder, self._reporter = ledger, ledger.folder, reporter
        self._deadline = deadline
        self._checkpoints = Checkpoints(ledger, system.recipe.checkpoint.keep, reporter.message)
        self._first = ledger.manifest.completed
        """The first task that this process trains; the state after the tasks before it is only on the disk."""

    def restore(self, place: TaskPlace) -> dict[str, Any]:
        """Restore model and optimiser to the position in the manifest, or to the latest intact state before it; return
        the saved JSON state ({}: start of the task).

        Raises:
            TaskLost: The previous task has to be trained again: `take_back` it and restore that one.
            CheckpointDamaged: There is no intact state to continue from.
        """
        # First choice: the newest intact checkpoint inside the task.
        found = None
        if self._ledger.manifest.checkpoints:
            self._engine.prepare_task(place.index)
            found = self._checkpoints.restore(self._load)
        if found is not None:
            # Checkpoints after this one are damaged. Methods start the task first, and then get their saved state.
            self._checkpoints.forget_after(found.entry)
            self._engine.before_task(place)
            self._engine.method.load_state_dict(found.state)
            self._ledger.log(event="resumed", task=place.name, step=found.entry.step)
            self._reporter.message(f"resuming task {place.name} after step {found.entry.step} of {place.steps}")
            return found.state
        # Otherwise start the task from the end state of the previous one.
        if place.index > 0:
            self.restore_before(place.index)
        self._engine.prepare_task(place.index)
        if self._ledger.manifest.checkpoints:  # but all of them are damaged
            self._checkpoints.forget_after(None)
            self._ledger.log(event="resumed", task=place.name, step=0)
            self._reporter.message(f"no saved state inside task {place.name} is intact: training it from the start")
        if not self._recipe.train.keep_optimizer:
            self._engine.shards.reset_optimizer()
        self._reporter.working("starting the task")
        self._engine.before_task(place)
        return {}

    def restore_before(self, index: int) -> None:
        """Restore the model that task `index` (above 0) starts from, unless this process has trained it itself.

        Raises:
            TaskLost, CheckpointDamaged: As in `restore`.
        """
        if index == self._first:
            # The tasks right before may have no steps of their own.
            trained = max(task for task in range(index) if self._engine.method.trains(task))
            self._engine.prepare_task(trained)
            self._engine.method.load_state_dict(self._load_end_state(trained))

    def _load_end_state(self, index: int) -> dict[str, Any]:
        """Load the end state of task `index`."""
        try:
            return self._load(self._end_state(index))
        except CheckpointDamaged as damage:
            # The task can be trained again only if the state that it started from is intact.
            try:
                if index > 0:
                    require_intact(self._end_state(index - 1))
            except CheckpointDamaged as error:
                raise CheckpointDamaged(
                    f"{damage}, and {error}; there is no older state to resume from; {self._intact()}"
                ) from error
            name = self._tasks[index].name
            raise TaskLost(f"{damage}; going back to the start of task {name}", index) from damage

    def _end_state(self, index: int) -> Path:
        return self._folder.task(index, self._tasks[index].name).state

    def take_back(self, lost: TaskLost) -> None:
        """Make the lost task the current one again, at its start."""
        self._reporter.message(str(lost))
        folder = str(self._end_state(lost.index).relative_to(self._folder.path))
        self._ledger.log(event="damaged", folder=folder, message=str(lost))
        manifest = self._ledger.manifest
        while manifest.completed > lost.index:
            manifest = manifest.taken_back()
        self._ledger.replace(manifest)
        self._first = lost.index
        self._ledger.log(event="resumed", task=self._tasks[lost.index].name, step=0)
        self.forget_strays()

    def forget_older(self, index: int) -> None:
        """Delete end states that no resume needs now that task `index` is complete; models and predictions stay.

        Unless it was the last task, the state that it started from also stays, in case its end state gets damaged.
        """
        if not self._ledger.writer:
            return
        finished = index + 1 == len(self._tasks)
        for older in range(index if finished else index - 1):
            shutil.rmtree(self._end_state(older), ignore_errors=True)

    def _intact(self) -> str:
        """The parts of the run that are not affected by damaged states."""
        done = self._tasks[: self._first]
        models = [self._folder.task(index, task.name).model for index, task in enumerate(done)]
        readable = [task.name for task, model in zip(done, models, strict=True) if is_readable_export(model)]
        names = ", ".join(readable) or "no task"
        return f"still intact: the scores so far and, in {self._folder.tasks}, the models after {names}"

    def _load(self, folder: Path) -> dict[str, Any]:
        """Load weights, moments and the methods' tensors from a saved state; return its JSON values."""
        self._reporter.working("loading the saved state")
        method = self._engine.method
        state = load_snapshot(folder, self._engine.shards, method.tensors(), method.later_tensors)
        method.tensors_loaded()
        return state

    def save(self, path: Path, place: TaskPlace, spent: Spent, *, trained: bool) -> None:
        """Save the state of all ranks, then name it in the manifest, then delete the states that are too old."""
        began = time.monotonic()
        self._reporter.working("saving the state")
        beat(f"saving the state of task {place.name}")
        self._engine.method.before_save()
        state = {"trained": trained, "spent": dataclasses.asdict(spent), **self._engine.method.state_dict()}
        # The next task starts with fresh moments, unless the recipe keeps them.
        moments = not trained or self._recipe.train.keep_optimizer
        with self._deadline.saving():
            save_snapshot(path, self._engine.shards, state, moments=moments, extra=self._engine.method.tensors())
        folder = str(path.relative_to(self._folder.path))
        self._checkpoints.add(CheckpointEntry(task=place.index, step=spent.steps, folder=folder))
        seconds = round(time.monotonic() - began, 4)
        self._ledger.log(event="saved", task=place.name, step=spent.steps, folder=folder, seconds=seconds)

    def forget_strays(self) -> None:
        """Delete saved states that the manifest does not name."""
        self._checkpoints.forget_strays()
