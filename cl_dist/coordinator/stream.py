"""One run from its first task to its last, and its metrics."""

from __future__ import annotations

import dataclasses
import shlex
import time
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from cl_dist.assembly import System
from cl_dist.config.load import dump_recipe
from cl_dist.coordinator.scoring import General, Row, Scoring
from cl_dist.coordinator.task_state import Spent, TaskLost, TaskState
from cl_dist.engine.distributed import leave, numbers_per_rank, peak_memory
from cl_dist.engine.stop import Deadline, StopRequest
from cl_dist.engine.trainer import TaskTrainer
from cl_dist.errors import Interrupted
from cl_dist.evaluation.metrics import (
    UNTOUCHED,
    all_metrics,
    average_performance_by_metric,
    general_ability,
    general_forgetting,
)
from cl_dist.heartbeat import beat, opaque
from cl_dist.methods.protocol import TaskPlace
from cl_dist.models.export import export_model
from cl_dist.models.lora import in_adapter
from cl_dist.progress import Reporter, score_names
from cl_dist.sharding import gather_state_dict
from cl_dist.state.atomic import publishing
from cl_dist.state.checkpoints import CheckpointSchedule
from cl_dist.state.data_order import DataOrder
from cl_dist.state.elastic import appended, segment
from cl_dist.state.ledger import Ledger
from cl_dist.state.manifest import NOTHING_SCORED, Manifest
from cl_dist.state.run_folder import RunFolder
from cl_dist.tasks.plan import planned_steps
from cl_dist.time_left import Work


class Coordinator:
    """One run on one rank.

    Args:
        system: Stream, model, engine and evaluator.
        ledger: Records what is done.
        reporter: Reports progress.
        deadline: Knows when the job's time is nearly over.
    """

    def __init__(self, system: System, ledger: Ledger, reporter: Reporter, deadline: Deadline) -> None:
        self.system, self.ledger, self.reporter = system, ledger, reporter
        self.recipe, self.tasks, self.folder = system.recipe, system.tasks, ledger.folder
        self.deadline = deadline
        self._state = TaskState(system, ledger, reporter, deadline)
        self._scoring = Scoring(system, ledger, reporter, self._stop_if_asked)
        self._schedule = CheckpointSchedule(self.recipe.checkpoint)
        self._order = DataOrder(self.folder.data_order, ledger.manifest.tasks, ledger.writer)

    def run(self) -> dict[str, Any]:
        """Train the tasks that are not trained yet; return the metrics."""
        self.ledger.start(dump_recipe(self.recipe))
        self._state.forget_strays()
        self.ledger.log(event="device", ranks=torch.distributed.get_world_size(), **(self.ledger.manifest.device or {}))
        self.reporter.run_started([task.name for task in self.tasks], torch.distributed.get_world_size(), self._work())
        # All notices about the scores go to the log, warnings also to the screen.
        for notice in self.system.notices:
            if notice.on_screen:
                self.reporter.message(notice.text)
            self.ledger.log(event="notice", task=notice.task, about=notice.about, message=notice.text)
        for text in self.system.start_messages():
            self.reporter.message(text)
            self.ledger.log(event="method", message=text)
        self._stop = StopRequest(self.deadline.is_near)
        try:
            self._evaluate_untouched()
            while self.ledger.manifest.completed < len(self.tasks):
                try:
                    self._run_task(self.ledger.manifest.completed)
                except TaskLost as lost:  # the previous task has to be trained again
                    self._state.take_back(lost)
            if self.ledger.manifest.status != "finished":  # all tasks were complete when this process started
                self.ledger.update(status="finished")
            return finish(self.ledger, self.reporter)
        finally:
            self._stop.close()

    def _work(self) -> Work:
        """What the run consists of, for the time left."""
        recipe, world, names = self.recipe, torch.distributed.get_world_size(), [task.name for task in self.tasks]
        counts, trains = [len(task.train) for task in self.tasks], self.system.engine.method.trains
        every = range(len(names))
        return Work(
            steps=tuple(planned_steps(recipe, index, counts, world) if trains(index) else 0 for index in every),
            samples={task.name: len(task.evaluation) for task in self.tasks},
            rows=tuple(tuple(names[: self._seen(index)]) for index in every),
            batch=recipe.train.micro_batch_size * recipe.train.gradient_accumulation * world,
            timings=self.ledger.manifest.timings,
        )

    def _seen(self, index: int) -> int:
        """How many tasks are scored after task `index`: unless all are, those learnt so far, including the next ones if
        they have no steps of their own.
        """
        if self.recipe.eval.tasks == "all":
            return len(self.tasks)
        later = range(index + 1, len(self.tasks))
        return next((task for task in later if self.system.engine.method.trains(task)), len(self.tasks))

    def _evaluate_untouched(self) -> None:
        """Record the first row of the matrix: the model before any training."""
        if self.ledger.manifest.accuracy_matrix:
            return
        row: Row = (None,) * len(self.tasks)
        if self.recipe.eval.before_training:
            row = self._scoring.row(range(len(self.tasks)), self.folder.tasks / "00-untouched" / "predictions")
        general = self._scoring.general(UNTOUCHED)
        self.ledger.update(general=general, **self.ledger.manifest.with_row(row))

    def _run_task(self, index: int) -> None:
        """Train, evaluate and export one task, then record it as complete."""
        if not self.system.engine.method.trains(index):
            # Without steps of its own, a task has the previous task's model and scores.
            self.reporter.task_started(index, self.tasks[index].name, 0)
            self._state.restore_before(index)
            general = self._scoring.general(self.tasks[index].name)
            self._complete(index, self.ledger.manifest.accuracy_matrix[-1], general, Spent(), 0.0)
            return
        self.reporter.working(f"preparing the data of {self.tasks[index].name}")
        trainer = self.system.trainer(index)
        place = TaskPlace(index, self.tasks[index].name, trainer.steps, trainer.cycles, trainer.probe)
        self.reporter.task_started(index, place.name, trainer.steps)
        spent = self._train(place, trainer)
        began = time.monotonic()
        row = self._scoring.row(range(self._seen(index)), self.folder.task(index, place.name).predictions)
        general = self._scoring.general(place.name)
        self._export(self.folder.task(index, place.name).model)
        self._write_results(self.folder.task(index, place.name).path)
        self._complete(index, row, general, spent, time.monotonic() - began)
        self._state.forget_older(index)

    def _complete(self, index: int, row: Row, general: General, spent: Spent, evaluate_seconds: float) -> None:
        """Record in the manifest that a task is trained, evaluated and saved (collective)."""
        timings = {**dataclasses.asdict(spent), "evaluate_seconds": evaluate_seconds}
        manifest = self.ledger.manifest
        # Each rank's peak over all restarts, which may have had different numbers of ranks.
        peaks = zip_longest(numbers_per_rank(peak_memory()), manifest.peak_memory_bytes, fillvalue=0)
        held = zip_longest(numbers_per_rank(self.system.engine.shards.state_bytes), manifest.state_bytes, fillvalue=0)
        method = self.system.engine.method
        share = method.kept_share() if method.trains(index) else None
        self.ledger.update(
            general=general,
            **manifest.with_row(row),
            completed=index + 1,
            checkpoints=(),
            timings=(*manifest.timings, timings),
            peak_memory_bytes=tuple(max(pair) for pair in peaks),
            # An older release recorded none.
            kept_share=(*manifest.kept_share, *[None] * (index - len(manifest.kept_share)), share),
            state_bytes=tuple(max(pair) for pair in held),
            status="finished" if index + 1 == len(self.tasks) else "running",
        )
        self._state.forget_strays()
        self.reporter.task_finished(index, list(row))

    def _train(self, place: TaskPlace, trainer: TaskTrainer) -> Spent:
        """Train one task from its restored position to its saved end state."""
        state = self._state.restore(place)
        spent = Spent(**state.get("spent", {}))
        if state.get("trained"):
            return spent
        # Scores of this task belong to a trained model whose state was found damaged. Trained again, on other ranks
        # perhaps, the model may differ by rounding.
        if self.ledger.manifest.row_under_way or self.ledger.manifest.general_under_way:
            self.ledger.update(**NOTHING_SCORED)
        # Record which ranks compute the steps from here on.
        now = segment(self.recipe, torch.distributed.get_world_size(), place.index, spent.steps)
        segments = appended(self.ledger.manifest.segments, now)
        if segments != self.ledger.manifest.segments:
            self.ledger.update(segments=segments)
        self._schedule.restart()
        self._order.rewind(place.index, spent.steps)
        for step in range(spent.steps, trainer.steps):
            beat(f"training task {place.name}, step {step + 1}")
            began = time.monotonic()
            result = trainer.step(step)
            self.deadline.stepped(time.monotonic() - began)  # the all-reduce below already decides by it
            skipped = spent.skipped + self._note_samples(place, step, trainer.samples(step), result.skipped)
            # One small all-reduce: does any rank want to stop, is the interval over on any rank, did rank 0 fail to
            # write its log? Loss and targets ride along.
            stop, (loss, targets, minutes_over, unwritten) = self._stop.agreed_with(
                result.loss_sum, result.targets, self._schedule.minutes_over(), self.ledger.failed
            )
            # A GPU still works on the update when the host has come this far. Reading that all-reduce waits for it, so
            # the clock stops here, without a synchronisation of its own.
            seconds = time.monotonic() - began
            self.deadline.stepped(seconds)
            spent = Spent(spent.train_seconds + seconds, step + 1, spent.tokens + trainer.tokens(step), skipped)
            if unwritten:
                self.ledger.settle()
            loss /= max(1.0, targets)
            self.reporter.step(step + 1, loss, trainer.tokens(step) / seconds, self.system.engine.learning_rate(step))
            self.ledger.log(event="step", task=place.name, step=step + 1, loss=loss, seconds=round(seconds, 4))
            self._after_step(place, spent, stop, minutes_over > 0)
        # The method may change the weights after the last step, and may want the original ones kept.
        if self.system.engine.method.keeps_unfused:
            self._export(self.folder.task(place.index, place.name).unfused)
        self.reporter.working("finishing the task")
        self.system.engine.method.after_task(place)
        self._save(self.folder.task(place.index, place.name).state, place, spent, trained=True)
        return spent

    def _note_samples(self, place: TaskPlace, step: int, samples: list[int], skipped: str | None) -> bool:
        """Record the samples of step `step` (from 0); returns whether the step was skipped."""
        self.ledger.append(lambda: self._order.append(place.index, step + 1, samples, skipped is not None))
        if skipped is None:
            return False
        self.reporter.message(f"step {step + 1} of task {place.name} skipped: {skipped}")
        self.ledger.log(event="skipped", task=place.name, step=step + 1, reason=skipped, samples=samples)
        return True

    def _after_step(self, place: TaskPlace, spent: Spent, stop: bool, minutes_over: bool) -> None:
        """Save if a checkpoint is due, and stop if a signal asked for it."""
        due = spent.steps < place.steps and self._schedule.due(spent.steps, minutes_over)
        if stop and self.deadline.is_near():
            self.reporter.message("the job's time is nearly over")
        if stop or due:
            self._save(self.folder.checkpoint(place.index, spent.steps), place, spent, trained=False)
        if stop:
            self._interrupt(f"stopped after step {spent.steps} of task {place.name}")

    def _save(self, path: Path, place: TaskPlace, spent: Spent, *, trained: bool) -> None:
        """Save the state of all ranks, and restart the checkpoint interval."""
        self._order.sync()
        self._state.save(path, place, spent, trained=trained)
        self._schedule.restart()

    def _stop_if_asked(self) -> None:
        """Called between two batches of an evaluation, when the task is trained and saved."""
        if self._stop.agreed():
            self._interrupt("stopped during evaluation")

    def _interrupt(self, where: str) -> None:
        """End the run with its state saved (collective)."""
        self.ledger.update(status="interrupted")
        leave()
        raise Interrupted(f"{where}; the state is saved, continue with --resume")

    def _export(self, path: Path) -> None:
        """Write the model or its adapter in Hugging Face format."""
        model = self.system.engine.model
        self.reporter.working("writing the model")
        beat("writing the model")
        weights = gather_state_dict(model, wanted=in_adapter if self.recipe.model.lora is not None else None)

        def write() -> None:
            with publishing(path) as temporary, opaque():
                export_model(model, self.system.loaded.tokenizer, temporary, weights)  # type: ignore[arg-type]

        self.ledger.write(write)

    def _write_results(self, folder: Path) -> None:
        """Let the method write its results next to the task's model."""
        self.ledger.write(lambda: self.system.engine.method.write_results(folder))


def finish(ledger: Ledger, reporter: Reporter) -> dict[str, Any]:
    """Write and report the metrics of a finished run, and leave the process group."""
    metrics = run_metrics(ledger.manifest)
    ledger.write_metrics(metrics)
    reporter.run_finished(metrics)
    reporter.message(what_next(ledger.folder, ledger.manifest))
    leave()
    return metrics


def what_next(folder: RunFolder, manifest: Manifest) -> str:
    """Where the model of a finished run is, and what to do with it, a line each."""
    steps = [entry.get("steps") for entry in manifest.timings]
    # Tasks without steps of their own share the model of the task before.
    last = max((index for index, number in enumerate(steps) if number != 0), default=0)
    path = shlex.quote(str(folder.path))
    model = folder.task(last, manifest.tasks[last]).model
    lines = {
        "model after the last task": f"{model} (Hugging Face format)",
        "report with figures": f"cl-dist report {path}",
        "score the model again": f"cl-dist eval {path}",
        "model card, Hub, vLLM": f"cl-dist export {path} --out DIR",
    }
    return "\n" + "\n".join(f"{what:<25}  {where}" for what, where in lines.items())


def run_metrics(manifest: Manifest) -> dict[str, Any]:
    """The content of metrics.json, which follows from the manifest alone."""
    seconds = sum(entry.get("train_seconds", 0.0) for entry in manifest.timings)
    steps = sum(entry.get("steps", 0) for entry in manifest.timings)
    scoring = manifest.scoring_by_task()
    return {
        "tasks": list(manifest.tasks),
        "accuracy_matrix": [list(row) for row in manifest.accuracy_matrix],
        "notes": manifest.notes,
        **all_metrics(manifest.accuracy_matrix),
        "average_performance_by_metric": average_performance_by_metric(
            manifest.accuracy_matrix, manifest.tasks, score_names(scoring)
        ),
        **scoring,
        "cut_generations_matrix": [list(cut) or [None] * len(row) for row, cut in manifest.rows_with_cuts],
        "general": [dict(entry) for entry in manifest.general],
        "general_ability": general_ability(manifest.general, manifest.tasks),
        "general_forgetting": general_forgetting(manifest.general, manifest.tasks),
        "tokens_per_second": sum(entry.get("tokens", 0) for entry in manifest.timings) / max(seconds, 1e-9),
        "step_seconds": seconds / max(steps, 1),
        "peak_memory_bytes": list(manifest.peak_memory_bytes),
        "kept_share": dict(zip(manifest.tasks, manifest.kept_share, strict=False)),
        "state_bytes_per_rank": list(manifest.state_bytes),
        "timings": [dict(entry) for entry in manifest.timings],
        "device": manifest.device,
        "world_size": manifest.world_size,
        "zero_stage": manifest.zero_stage,
        "segments": [dataclasses.asdict(entry) for entry in manifest.segments],
        "restarts": manifest.restarts,
    }
