"""Steps through the stream: train a task, evaluate, save, go on. Knows tasks, not tensors.

Every rank runs the same coordinator in one process group; rank 0 alone writes the run folder's JSON files. What is
saved is saved before the manifest says so: after a kill at any moment the manifest names the newest state that is
whole.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from cl_dist.assembly import System, build_saved, build_system
from cl_dist.config.load import dump_recipe
from cl_dist.config.schema import Recipe
from cl_dist.engine.broken import telling_broken_collectives
from cl_dist.engine.deadline import Deadline, SecondsLeft, no_limit
from cl_dist.engine.distributed import join, leave
from cl_dist.engine.memory import peak_memory_per_rank
from cl_dist.engine.quiet import quiet_libraries
from cl_dist.engine.stop import StopRequest
from cl_dist.engine.trainer import TaskTrainer
from cl_dist.errors import Interrupted
from cl_dist.evaluation.general import is_due
from cl_dist.evaluation.metrics import UNTOUCHED, all_metrics, general_ability, general_forgetting
from cl_dist.evaluation.result import write_predictions
from cl_dist.heartbeat import beat
from cl_dist.methods.base import TaskPlace
from cl_dist.models.dropout import has_dropout
from cl_dist.models.export import export_model, is_readable_export
from cl_dist.models.lora import in_adapter
from cl_dist.progress import Reporter
from cl_dist.sharding import gather_state_dict
from cl_dist.state.atomic import publishing, telling_full_disk, write_json
from cl_dist.state.checkpoints import Checkpoints
from cl_dist.state.data_order import DataOrder
from cl_dist.state.elastic import Resumption, appended, resumption, segment, with_segments
from cl_dist.state.integrity import CheckpointDamaged
from cl_dist.state.ledger import Ledger
from cl_dist.state.lock import RunLock
from cl_dist.state.manifest import CheckpointEntry, Manifest
from cl_dist.state.run_folder import RunFolder
from cl_dist.state.schedule import CheckpointSchedule
from cl_dist.state.snapshot import load_snapshot, save_snapshot
from cl_dist.watchdog import End, Watchdog

Row = tuple[float | None, ...]
General = tuple[dict[str, Any], ...]
"""As the manifest has it."""


@dataclasses.dataclass
class Spent:
    """What training a task has taken so far, over all its restarts."""

    train_seconds: float = 0.0
    steps: int = 0
    tokens: int = 0
    skipped: int = 0
    """Steps that updated nothing (`train.max_skipped_steps`)."""


def run(
    recipe: Recipe,
    recipe_dir: Path,
    *,
    resume: bool,
    reporter: Reporter,
    end: End,
    seconds_left: SecondsLeft = no_limit,
) -> dict[str, Any]:
    """Train the recipe's stream on this rank together with the others, and return the content of metrics.json.

    Args:
        recipe: The resolved recipe.
        recipe_dir: Folder that the recipe's relative paths start from.
        resume: Go on from the newest saved state in `recipe.output_dir`.
        reporter: Where progress is told.
        end: Ends this process at once, from another thread, where the job hangs.
        seconds_left: How long the job may still run, asked on rank 0; None: for ever.

    Raises:
        BadInput: The recipe, its data or its model is not usable, or another run holds the folder.
        JobFailed: Ranks do not answer, or the training has gone wrong.
        Interrupted: A signal asked the run to stop, or its time is nearly over; its state is saved.
    """
    rank, world = join(recipe.launch.timeout_seconds)
    quiet_libraries(rank)
    folder = RunFolder(Path(recipe.output_dir))
    with ExitStack() as stack:
        if rank == 0:
            folder.path.mkdir(parents=True, exist_ok=True)
            stack.enter_context(RunLock(folder.lock))
            folder.recover()
            Watchdog.prepare(folder.logs)
        torch.distributed.barrier()
        watchdog = stack.enter_context(Watchdog(folder.logs, rank, world, recipe.launch.hang_seconds, end))
        stack.enter_context(telling_broken_collectives(rank, recipe.launch.timeout_seconds, watchdog.give_up))
        manifest, resumed = _starting_point(folder, recipe, world, resume)
        ledger = Ledger(folder, manifest, writer=rank == 0)
        if manifest.status == "finished":
            reporter.message("this run is finished already; nothing is left to do")
            return _finish(ledger, reporter)
        with _failure_noted(ledger):
            system = build_system(resumed.recipe, recipe_dir)
            _tell_what_is_new(resumed, system, reporter)
            deadline = Deadline(seconds_left if rank == 0 else no_limit)
            return Coordinator(system, ledger, reporter, deadline).run()


def _finish(ledger: Ledger, reporter: Reporter) -> dict[str, Any]:
    """Write and report the metrics of a finished run; they follow from its manifest."""
    metrics = _metrics(ledger.manifest)
    ledger.write_metrics(metrics)
    reporter.run_finished(metrics)
    leave()
    return metrics


def _metrics(manifest: Manifest) -> dict[str, Any]:
    """The content of metrics.json."""
    seconds = sum(entry["train_seconds"] for entry in manifest.timings)
    steps = sum(entry["steps"] for entry in manifest.timings)
    return {
        "tasks": list(manifest.tasks),
        "accuracy_matrix": [list(row) for row in manifest.accuracy_matrix],
        **all_metrics(manifest.accuracy_matrix),
        "general": [dict(entry) for entry in manifest.general],
        "general_ability": general_ability(manifest.general, manifest.tasks),
        "general_forgetting": general_forgetting(manifest.general, manifest.tasks),
        "tokens_per_second": sum(entry["tokens"] for entry in manifest.timings) / max(seconds, 1e-9),
        "step_seconds": seconds / max(steps, 1),
        "peak_memory_bytes": list(manifest.peak_memory_bytes),
        "timings": [dict(entry) for entry in manifest.timings],
        "world_size": manifest.world_size,
        "zero_stage": manifest.zero_stage,
        "segments": [dataclasses.asdict(segment) for segment in manifest.segments],
        "restarts": manifest.restarts,
    }


@contextmanager
def _failure_noted(ledger: Ledger) -> Iterator[None]:
    """Let the manifest of a run that has begun say that it failed; `--resume` goes on from what is saved."""
    try:
        yield
    except Interrupted:
        raise
    except Exception:
        if ledger.folder.manifest.exists():
            with suppress(Exception):  # a full disk, say: the first error is the one to tell
                ledger.update(status="failed")
        raise


def evaluate(recipe: Recipe, recipe_dir: Path, *, task_index: int, reporter: Reporter) -> dict[str, float]:
    """Score the model that the run in `recipe.output_dir` saved after task `task_index`, on every task of the recipe.

    The scores are also written to evaluation.json in the task's folder. The model is loaded whole on every rank.

    Raises:
        BadInput: The saved model or the data is not usable.
    """
    rank, _ = join(recipe.launch.timeout_seconds)
    quiet_libraries(rank)
    folder = RunFolder(Path(recipe.output_dir)).task(task_index, recipe.stream.tasks[task_index].name)
    tasks, evaluator = build_saved(recipe, recipe_dir, folder.model)
    scores: dict[str, float] = {}
    for task in tasks:
        result = evaluator.evaluate(task)
        scores[task.name] = result.score
        reporter.message(
            f"{task.name}: {result.score:.4f} ({result.metric} of {result.count} samples, by {result.mode})"
        )
        if rank == 0:
            write_predictions(folder.path / "evaluation" / f"{task.name}.jsonl", result.predictions)
    if rank == 0:
        write_json(folder.path / "evaluation.json", scores)
    leave()
    return scores


def _starting_point(folder: RunFolder, recipe: Recipe, world: int, resume: bool) -> tuple[Manifest, Resumption]:
    """Read or make the manifest on every rank, before rank 0 changes it; and the recipe as these ranks run it."""
    resumed = Resumption(recipe, note=None, new_split=False)
    if resume and folder.manifest.exists():
        manifest = Manifest.read(folder.manifest)
        if manifest.status != "finished":
            manifest = with_segments(manifest, folder.config)
            resumed = resumption(recipe, manifest.segments[-1], world, folder.path)
    else:
        names = tuple(task.name for task in recipe.stream.tasks)
        first = segment(recipe, world)
        manifest = Manifest(tasks=names, world_size=world, zero_stage=recipe.zero.stage, segments=(first,))
    torch.distributed.barrier()
    if not resume or manifest.status == "finished":
        return manifest, resumed
    manifest = dataclasses.replace(manifest, status="running", restarts=manifest.restarts + 1)
    return dataclasses.replace(manifest, world_size=world, zero_stage=recipe.zero.stage), resumed


def _tell_what_is_new(resumed: Resumption, system: System, reporter: Reporter) -> None:
    """One line where these ranks do not train as the ones before, or not as the recipe says."""
    if resumed.note is None:
        return
    drawn = resumed.new_split and has_dropout(system.engine.model)
    dropout = "; dropout draws other numbers than it would have, so the weights will not be exactly the same"
    reporter.message(resumed.note + (dropout if drawn else ""))


class Coordinator:
    """One run on one rank.

    Args:
        system: Stream, model, engine and evaluator.
        ledger: What is done so far.
        reporter: Where progress is told.
        deadline: The end of the job's time.
    """

    def __init__(self, system: System, ledger: Ledger, reporter: Reporter, deadline: Deadline) -> None:
        self.system, self.ledger, self.reporter = system, ledger, reporter
        self.recipe, self.tasks, self.folder = system.recipe, system.tasks, ledger.folder
        self.deadline = deadline
        self._checkpoints = Checkpoints(ledger, self.recipe.checkpoint.keep, reporter.message)
        self._schedule = CheckpointSchedule(self.recipe.checkpoint)
        self._order = DataOrder(self.folder.data_order, ledger.manifest.tasks, ledger.writer)
        self._first = ledger.manifest.completed
        """The first task that this process trains: the ones before are known from disk only."""

    def run(self) -> dict[str, Any]:
        """Train what is not yet trained; return the metrics."""
        self.ledger.start(dump_recipe(self.recipe))
        self._checkpoints.forget_strays()
        self.reporter.run_started([task.name for task in self.tasks], torch.distributed.get_world_size())
        for text in filter(None, (method.start_message() for method in self.system.engine.methods)):
            self.reporter.message(text)
            self.ledger.log(event="method", message=text)
        self._stop = StopRequest(self.deadline.is_near)
        try:
            self._evaluate_untouched()
            for index in range(self._first, len(self.tasks)):
                self._run_task(index)
            return _finish(self.ledger, self.reporter)
        finally:
            self._stop.close()

    def _evaluate_untouched(self) -> None:
        """The matrix's first row: the model before any training."""
        if self.ledger.manifest.accuracy_matrix:
            return
        row: Row = (None,) * len(self.tasks)
        if self.recipe.eval.before_training:
            row = self._evaluate(range(len(self.tasks)), self.folder.tasks / "00-untouched" / "predictions")
        general = self._evaluate_general(UNTOUCHED)
        self.ledger.update(accuracy_matrix=(row,), general=general)

    def _run_task(self, index: int) -> None:
        if not self.system.engine.trains(index):
            self._repeat_task(index)
            return
        trainer = self.system.trainer(index)
        place = TaskPlace(index, self.tasks[index].name, trainer.steps, trainer.cycles, trainer.probe)
        self.reporter.task_started(index, place.name, trainer.steps)
        spent = self._train(place, trainer)
        began = time.monotonic()
        seen = len(self.tasks) if self.recipe.eval.tasks == "all" else self._seen(index)
        row = self._evaluate(range(seen), self.folder.task(index, place.name).predictions)
        general = self._evaluate_general(place.name)
        self._export(self.folder.task(index, place.name).model)
        self._write_results(self.folder.task(index, place.name).path)
        self._complete(index, row, general, spent, time.monotonic() - began)
        self._forget_older_states(index)

    def _seen(self, index: int) -> int:
        """How many tasks the model has learnt after task `index`: those behind it without own steps, too."""
        later = range(index + 1, len(self.tasks))
        return next((task for task in later if self.system.engine.trains(task)), len(self.tasks))

    def _repeat_task(self, index: int) -> None:
        """A task without steps of its own: the model is the one of the task before, and so are its scores."""
        self.reporter.task_started(index, self.tasks[index].name, 0)
        general = self._evaluate_general(self.tasks[index].name)
        self._complete(index, self.ledger.manifest.accuracy_matrix[-1], general, Spent(), 0.0)

    def _complete(self, index: int, row: Row, general: General, spent: Spent, evaluate_seconds: float) -> None:
        """Let the manifest say that a task is trained, evaluated and saved."""
        timings = {**dataclasses.asdict(spent), "evaluate_seconds": evaluate_seconds}
        manifest = self.ledger.manifest
        self.ledger.update(
            accuracy_matrix=(*manifest.accuracy_matrix, row),
            general=general,
            completed=index + 1,
            checkpoints=(),
            timings=(*manifest.timings, timings),
            peak_memory_bytes=self._peak_memory(),
            status="finished" if index + 1 == len(self.tasks) else "running",
        )
        self._checkpoints.forget_strays()
        self.reporter.task_finished(index, list(row))

    def _train(self, place: TaskPlace, trainer: TaskTrainer) -> Spent:
        """Train one task from wherever it stands to its saved end state."""
        state = self._restore(place)
        spent = Spent(**state.get("spent", {}))
        if state.get("trained"):
            return spent
        self._begin_segment(place, spent.steps)
        self._schedule.restart()
        self._order.rewind(place.index, spent.steps)
        for step in range(spent.steps, trainer.steps):
            beat(f"training task {place.name}, step {step + 1}")
            began = time.monotonic()
            result = trainer.step(step)
            seconds = time.monotonic() - began
            self.deadline.stepped(seconds)
            skipped = spent.skipped + self._note_samples(place, step, trainer.samples(step), result.skipped)
            spent = Spent(spent.train_seconds + seconds, step + 1, spent.tokens + trainer.tokens(step), skipped)
            stop, (loss, targets, minutes_over) = self._stop.agreed_with(
                result.loss_sum, result.targets, self._schedule.minutes_over()
            )
            loss /= max(1.0, targets)
            self.reporter.step(step + 1, loss, trainer.tokens(step) / seconds, trainer.learning_rate(step))
            self.ledger.log(event="step", task=place.name, step=step + 1, loss=loss, seconds=round(seconds, 4))
            self._after_step(place, spent, stop, minutes_over > 0)
        self._finish_task(place)
        self._save(self.folder.task(place.index, place.name).state, place, spent, trained=True)
        return spent

    def _note_samples(self, place: TaskPlace, step: int, samples: list[int], skipped: str | None) -> bool:
        """Write down what step `step` (from 0) has learnt from, and whether it was skipped, which is returned."""
        self._order.append(place.index, step + 1, samples, skipped is not None)
        if skipped is None:
            return False
        self.reporter.message(f"step {step + 1} of task {place.name} skipped: {skipped}")
        self.ledger.log(event="skipped", task=place.name, step=step + 1, reason=skipped, samples=samples)
        return True

    def _finish_task(self, place: TaskPlace) -> None:
        """Let the methods change the weights of a trained task; keep what they were where a method asks for it."""
        engine = self.system.engine
        if any(method.keeps_unfused for method in engine.methods):
            self._export(self.folder.task(place.index, place.name).unfused)
        engine.after_task(place)

    def _begin_segment(self, place: TaskPlace, step: int) -> None:
        """Let the manifest say which ranks compute the steps from here on."""
        now = segment(self.recipe, torch.distributed.get_world_size(), place.index, step)
        segments = appended(self.ledger.manifest.segments, now)
        if segments != self.ledger.manifest.segments:
            self.ledger.update(segments=segments)

    def _restore(self, place: TaskPlace) -> dict[str, Any]:
        """Bring model and optimiser to where the manifest says the run is, or as near to it as the saved states allow;
        return the saved JSON state ({}: task start).
        """
        engine = self.system.engine
        found = None
        if self.ledger.manifest.checkpoints:
            engine.prepare_task(place.index)
            found = self._checkpoints.restore(self._load)
        if found is not None:
            self._checkpoints.forget_after(found.entry)
            engine.before_task(place)
            engine.load_method_states(found.state["methods"])
            self.ledger.log(event="resumed", task=place.name, step=found.entry.step)
            self.reporter.message(f"resuming task {place.name} after step {found.entry.step} of {place.steps}")
            return found.state
        self._restore_task_start(place)
        engine.before_task(place)
        return {}

    def _restore_task_start(self, place: TaskPlace) -> None:
        """The end state of the task before, from disk where this process has not trained it."""
        engine = self.system.engine
        if 0 < place.index == self._first:
            before = self.folder.task(place.index - 1, self.tasks[place.index - 1].name)
            engine.prepare_task(place.index - 1)
            engine.load_method_states(self._load_end_state(before.state)["methods"])
        engine.prepare_task(place.index)
        if self.ledger.manifest.checkpoints:  # all of them are damaged
            self._checkpoints.forget_after(None)
            self.ledger.log(event="resumed", task=place.name, step=0)
            self.reporter.message(f"no saved state inside task {place.name} is intact: training it from its beginning")
        if not self.recipe.train.keep_optimizer:
            engine.shards.reset_optimizer()

    def _load_end_state(self, folder: Path) -> dict[str, Any]:
        """Load the state that a task starts from; there is no older one to go back to."""
        try:
            return self._load(folder)
        except CheckpointDamaged as error:
            raise CheckpointDamaged(f"{error}; there is no older state to resume from; {self._intact()}") from error

    def _intact(self) -> str:
        """What of the run a damaged state does not touch."""
        done = self.tasks[: self._first]
        models = [self.folder.task(index, task.name).model for index, task in enumerate(done)]
        readable = [task.name for task, model in zip(done, models, strict=True) if is_readable_export(model)]
        names = ", ".join(readable) or "no task"
        return f"intact are the scores so far and, in {self.folder.tasks}, the models after {names}"

    def _load(self, folder: Path) -> dict[str, Any]:
        """Fill weights, moments and the methods' tensors from a saved state; return its JSON values."""
        engine = self.system.engine
        state = load_snapshot(folder, engine.shards, engine.method_tensors())
        engine.method_tensors_loaded()
        return state

    def _after_step(self, place: TaskPlace, spent: Spent, stop: bool, minutes_over: bool) -> None:
        """Save where it is due, and stop where a signal asked for it."""
        due = spent.steps < place.steps and self._schedule.due(spent.steps, minutes_over)
        if stop and self.deadline.is_near():
            self.reporter.message("the job's time is nearly over")
        if stop or due:
            self._save(self.folder.checkpoint(place.index, spent.steps), place, spent, trained=False)
        if stop:
            self._interrupt(f"stopped after step {spent.steps} of task {place.name}")

    def _save(self, path: Path, place: TaskPlace, spent: Spent, *, trained: bool) -> None:
        """Save the state of all ranks, then let the manifest name it, then forget those that are too old."""
        began = time.monotonic()
        engine = self.system.engine
        beat(f"saving the state of task {place.name}", opaque=True)
        engine.before_save()
        self._order.sync()
        state = {"trained": trained, "spent": dataclasses.asdict(spent), "methods": engine.method_states()}
        moments = not trained or self.recipe.train.keep_optimizer
        with self.deadline.saving():
            save_snapshot(path, engine.shards, state, moments=moments, extra=engine.method_tensors())
        folder = str(path.relative_to(self.folder.path))
        self._checkpoints.add(CheckpointEntry(task=place.index, step=spent.steps, folder=folder))
        self._schedule.restart()
        seconds = round(time.monotonic() - began, 4)
        self.ledger.log(event="saved", task=place.name, step=spent.steps, folder=folder, seconds=seconds)

    def _interrupt(self, where: str) -> None:
        """Leave in good order; all ranks come here together."""
        self.ledger.update(status="interrupted")
        leave()
        raise Interrupted(f"{where}; the state is saved, go on with --resume")

    def _evaluate(self, indices: range, predictions: Path) -> Row:
        """Score the tasks at `indices`, in the order of the stream; None for the others."""
        row: list[float | None] = [None] * len(self.tasks)
        for index in indices:
            if self._stop.agreed():
                self._interrupt("stopped during evaluation")
            task = self.tasks[index]
            self.reporter.evaluating(task.name)
            beat(f"evaluating task {task.name}")
            result = self.system.evaluator.evaluate(task)
            row[index] = result.score
            if self.ledger.writer:
                with telling_full_disk(predictions):
                    write_predictions(predictions / f"{task.name}.jsonl", result.predictions)
            extras = {"mode": result.mode, "metric": result.metric, "samples": result.count, **result.extras}
            self.ledger.log(
                event="evaluation", folder=predictions.parent.name, task=task.name, score=result.score, **extras
            )
        return tuple(row)

    def _evaluate_general(self, place: str) -> General:
        """All measurements of general ability so far, with the one after `place` where the recipe wants one."""
        before, config = self.ledger.manifest.general, self.recipe.eval.general
        if config is None or not is_due(config, place, self.ledger.manifest.tasks):
            return before
        assert self.system.general is not None
        scores: dict[str, Any] = {}
        for name in config.tasks:
            if self._stop.agreed():
                self._interrupt("stopped during evaluation")
            self.reporter.evaluating(name)
            beat(f"general ability: {name}")
            for result in self.system.general.evaluate(name):
                values = dataclasses.asdict(result)
                self.ledger.log(event="general", after=place, **values)
                scores[values.pop("task")] = values
        return (*before, {"after": place, "scores": scores})

    def _export(self, path: Path) -> None:
        """Write the model, or its adapter, in Hugging Face format."""
        model = self.system.engine.model
        beat("writing the model", opaque=True)
        weights = gather_state_dict(model, wanted=in_adapter if self.recipe.model.lora is not None else None)
        if self.ledger.writer:
            with publishing(path) as temporary:
                export_model(model, self.system.loaded.tokenizer, temporary, weights)  # type: ignore[arg-type]

    def _write_results(self, folder: Path) -> None:
        """Let the methods put what they found out beside the task's model."""
        if self.ledger.writer:
            for method in self.system.engine.methods:
                method.write_results(folder)

    def _forget_older_states(self, index: int) -> None:
        """A resume needs the newest task's state only; models and predictions of all tasks stay."""
        if not self.ledger.writer:
            return
        for older in range(index):
            shutil.rmtree(self.folder.task(older, self.tasks[older].name).state, ignore_errors=True)

    def _peak_memory(self) -> tuple[int, ...]:
        """Each rank's peak over all restarts, some of which may have had fewer ranks (collective)."""
        pairs = zip_longest(peak_memory_per_rank(), self.ledger.manifest.peak_memory_bytes, fillvalue=0)
        return tuple(max(pair) for pair in pairs)
