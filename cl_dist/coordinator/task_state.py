"""The state of the task under way: saved so that a kill harms nothing, and restored as near as the disk allows."""

from __future__ import annotations

import dataclasses
import shutil
import time
from pathlib import Path
from typing import Any

from cl_dist.assembly import System
from cl_dist.engine.deadline import Deadline
from cl_dist.heartbeat import beat
from cl_dist.methods.protocol import TaskPlace
from cl_dist.models.export import is_readable_export
from cl_dist.progress import Reporter
from cl_dist.state.checkpoints import Checkpoints
from cl_dist.state.integrity import CheckpointDamaged
from cl_dist.state.ledger import Ledger
from cl_dist.state.manifest import CheckpointEntry
from cl_dist.state.snapshot import load_snapshot, require_intact, save_snapshot

_NOTHING_OLDER = "there is no older state to resume from"


@dataclasses.dataclass
class Spent:
    """What training a task has taken so far, over all its restarts."""

    train_seconds: float = 0.0
    steps: int = 0
    tokens: int = 0
    skipped: int = 0
    """Steps that updated nothing (`train.max_skipped_steps`)."""


class TaskLost(CheckpointDamaged):
    """The end state of completed task `index` is damaged, and the state that the task began with is not."""

    def __init__(self, message: str, index: int) -> None:
        super().__init__(message)
        self.index = index


class TaskState:
    """Saves and restores model, optimiser and methods, all ranks together.

    Args:
        system: Tasks and engine.
        ledger: Names what is saved.
        reporter: Where progress is told.
        deadline: Learns how long a save takes.
    """

    def __init__(self, system: System, ledger: Ledger, reporter: Reporter, deadline: Deadline) -> None:
        self._engine, self._tasks, self._recipe = system.engine, system.tasks, system.recipe
        self._ledger, self._folder, self._reporter = ledger, ledger.folder, reporter
        self._deadline = deadline
        self._checkpoints = Checkpoints(ledger, system.recipe.checkpoint.keep, reporter.message)
        self._first = ledger.manifest.completed
        """The first task that this process trains: the ones before are known from disk only."""

    def restore(self, place: TaskPlace) -> dict[str, Any]:
        """Bring model and optimiser to where the manifest says the run is, or as near to it as the saved states allow;
        return the saved JSON state ({}: task start).

        Raises:
            TaskLost: The task before is to be trained again: `take_back` it and restore that one.
            CheckpointDamaged: There is no intact state to go on from.
        """
        found = None
        if self._ledger.manifest.checkpoints:
            self._engine.prepare_task(place.index)
            found = self._checkpoints.restore(self._load)
        if found is not None:
            self._checkpoints.forget_after(found.entry)
            self._engine.before_task(place)
            self._engine.method.load_state_dict(found.state)
            self._ledger.log(event="resumed", task=place.name, step=found.entry.step)
            self._reporter.message(f"resuming task {place.name} after step {found.entry.step} of {place.steps}")
            return found.state
        self._restore_task_start(place)
        self._engine.before_task(place)
        return {}

    def _restore_task_start(self, place: TaskPlace) -> None:
        """The end state of the task before, from disk where this process has not trained it."""
        if place.index > 0:
            self.restore_before(place.index)
        self._engine.prepare_task(place.index)
        if self._ledger.manifest.checkpoints:  # all of them are damaged
            self._checkpoints.forget_after(None)
            self._ledger.log(event="resumed", task=place.name, step=0)
            self._reporter.message(f"no saved state inside task {place.name} is intact: training it from its beginning")
        if not self._recipe.train.keep_optimizer:
            self._engine.shards.reset_optimizer()

    def restore_before(self, index: int) -> None:
        """Bring the model to where task `index` (above 0) finds it, where this process has not trained it to there; the
        task before may have had no steps of its own.

        Raises:
            TaskLost, CheckpointDamaged: As `restore` does.
        """
        if index == self._first:
            trained = max(task for task in range(index) if self._engine.method.trains(task))
            self._engine.prepare_task(trained)
            self._engine.method.load_state_dict(self._load_end_state(trained))

    def _load_end_state(self, index: int) -> dict[str, Any]:
        """Load the state that task `index` has ended with."""
        try:
            return self._load(self._end_state(index))
        except CheckpointDamaged as damage:
            if index > 0:
                self._require_beginning(index, damage)
            name = self._tasks[index].name
            raise TaskLost(f"{damage}; going back to the beginning of task {name}", index) from damage

    def _require_beginning(self, index: int, damage: CheckpointDamaged) -> None:
        """Raise unless task `index`, whose end state has `damage`, can be trained again."""
        try:
            require_intact(self._end_state(index - 1))
        except CheckpointDamaged as error:
            raise CheckpointDamaged(f"{damage}, and {error}; {_NOTHING_OLDER}; {self._intact()}") from error

    def _end_state(self, index: int) -> Path:
        return self._folder.task(index, self._tasks[index].name).state

    def take_back(self, lost: TaskLost) -> None:
        """Let the lost task be the one under way, at its beginning."""
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
        """Delete the end states that no resume needs now that task `index` is completed; models and predictions stay.

        The state that the task began with stays too, in case its end state is found damaged; not after the last task.
        """
        if not self._ledger.writer:
            return
        finished = index + 1 == len(self._tasks)
        for older in range(index if finished else index - 1):
            shutil.rmtree(self._end_state(older), ignore_errors=True)

    def _intact(self) -> str:
        """What of the run a damaged state does not touch."""
        done = self._tasks[: self._first]
        models = [self._folder.task(index, task.name).model for index, task in enumerate(done)]
        readable = [task.name for task, model in zip(done, models, strict=True) if is_readable_export(model)]
        names = ", ".join(readable) or "no task"
        return f"intact are the scores so far and, in {self._folder.tasks}, the models after {names}"

    def _load(self, folder: Path) -> dict[str, Any]:
        """Fill weights, moments and the methods' tensors from a saved state; return its JSON values."""
        state = load_snapshot(folder, self._engine.shards, self._engine.method.tensors())
        self._engine.method.tensors_loaded()
        return state

    def save(self, path: Path, place: TaskPlace, spent: Spent, *, trained: bool) -> None:
        """Save the state of all ranks, then let the manifest name it, then forget those that are too old."""
        began = time.monotonic()
        beat(f"saving the state of task {place.name}")
        self._engine.method.before_save()
        state = {"trained": trained, "spent": dataclasses.asdict(spent), **self._engine.method.state_dict()}
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
