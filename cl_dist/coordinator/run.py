"""Starts or resumes a run on every rank: claims the run folder, finds out where the run stands, and notes failures."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from cl_dist.assembly import System, build_system
from cl_dist.config.schema import Recipe
from cl_dist.coordinator.stream import Coordinator, finish
from cl_dist.engine.collective_errors import reporting_lost_ranks
from cl_dist.engine.device import set_matmul_precision
from cl_dist.engine.distributed import Joined, join, quiet_libraries
from cl_dist.engine.memory_errors import reporting_exhausted_memory
from cl_dist.engine.stop import Deadline, SecondsLeft, no_limit
from cl_dist.errors import BadInput, Interrupted
from cl_dist.heartbeat import beat
from cl_dist.models.training_mode import has_dropout
from cl_dist.progress import Reporter
from cl_dist.state.atomic import make_folder
from cl_dist.state.collective_failure import fail_together, on_first_rank
from cl_dist.state.elastic import Resumption, resumption, segment, with_segments
from cl_dist.state.inputs import plugin_changes, read_inputs, refuse_other_inputs, with_data
from cl_dist.state.ledger import Ledger
from cl_dist.state.lock import RunLock
from cl_dist.state.manifest import Manifest
from cl_dist.state.run_folder import RunFolder
from cl_dist.tracking.reporter import tracked
from cl_dist.watchdog import End, Watchdog


def run(
    recipe: Recipe,
    recipe_dir: Path,
    *,
    resume: bool,
    reporter: Reporter,
    end: End,
    seconds_left: SecondsLeft = no_limit,
    reported_once: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> dict[str, Any]:
    """Train the recipe's stream on this rank, together with the others, and return the content of metrics.json.

    Args:
        recipe: The resolved recipe.
        recipe_dir: Folder that the recipe's relative paths start from.
        resume: Continue from the latest saved state in `recipe.output_dir`.
        reporter: Reports progress.
        end: Ends this process at once, called from another thread if the job hangs.
        seconds_left: How long the job may still run, called on rank 0; None: without limit.
        reported_once: Context of work that rank 0 does for all ranks. If it fails, all ranks raise the same error, and
            only one of them should report it.

    Raises:
        BadInput: The recipe, its data or its model cannot be used, or another run holds the folder.
        RankLost: Another rank has ended or does not answer.
        JobFailed: Training failed.
        Interrupted: A signal asked the run to stop, or its time is nearly over; its state is saved.
    """
    others = int(os.environ.get("WORLD_SIZE", "1")) > 1
    reporter.phase("importing deepspeed" + (", meeting the other ranks" if others else ""))
    joined = join(recipe.launch.timeout_seconds, recipe.launch.device)
    set_matmul_precision(recipe.train.tf32)
    rank, world = joined.rank, joined.world
    quiet_libraries(rank)
    _report_device(joined, reporter)
    folder = RunFolder(Path(recipe.output_dir))
    with ExitStack() as stack:
        timeout = recipe.launch.timeout_seconds
        with reporting_lost_ranks(rank, timeout, lambda reason, _: reason), reported_once():
            beat("taking the run folder")
            fail_together(lambda: _claim(folder, stack, reporter) if rank == 0 else None)
        watchdog = stack.enter_context(Watchdog(folder.logs, rank, world, recipe.launch.hang_seconds, end))
        stack.enter_context(reporting_lost_ranks(rank, timeout, watchdog.give_up))
        stack.enter_context(reporting_exhausted_memory(rank, world, recipe))
        with reported_once():
            manifest, resumed = on_first_rank(lambda: _starting_point(folder, recipe, joined, resume))
        ledger = Ledger(folder, manifest, writer=rank == 0)
        if manifest.status == "finished":  # only its metrics may be missing
            reporter.message("this run is already finished; nothing is left to do")
            return finish(ledger, reporter)
        with _failure_noted(ledger), tracked(recipe, ledger, reporter) as reporter:
            system = build_system(resumed.recipe, recipe_dir, reporter.phase)
            if resumed.note is not None:
                _report_changes(resumed, resumed.note, system, reporter)
            # Changed inputs are rejected only now, since digesting them needs the data that was just read.
            with reported_once():
                ledger.manifest = _with_inputs(ledger, system, resume, reporter)
            deadline = Deadline(seconds_left if rank == 0 else no_limit)
            return Coordinator(system, ledger, reporter, deadline).run()


def _claim(folder: RunFolder, stack: ExitStack, reporter: Reporter) -> None:
    """Claim the run folder for this job until `stack` closes; runs on one rank."""
    try:
        make_folder(folder.path)
        stack.enter_context(RunLock(folder.lock, reporter.message))
        folder.recover()
        Watchdog.prepare(folder.logs)
    except OSError as error:
        raise BadInput(f"the run folder {folder.path} cannot be used: {error}") from error


def _report_device(joined: Joined, reporter: Reporter) -> None:
    """Print what the run computes on, and a warning if it leaves GPUs unused."""
    reporter.message(joined.describe())
    if (warning := joined.warning()) is not None:
        reporter.message(warning)


def _starting_point(folder: RunFolder, recipe: Recipe, joined: Joined, resume: bool) -> tuple[Manifest, Resumption]:
    """Read or create the manifest, and adapt the recipe to these ranks; runs on one rank."""
    world, device = joined.world, joined.to_dict()
    resumed = Resumption(recipe, note=None, new_split=False)
    if resume and folder.manifest.exists():
        manifest = Manifest.read(folder.manifest)
        if manifest.status != "finished":
            # The run keeps its global batch, divided over the ranks of this start.
            manifest = with_segments(manifest, folder.config)
            resumed = resumption(recipe, manifest.segments[-1], world, folder.path)
    else:
        names = tuple(task.name for task in recipe.stream.tasks)
        first = segment(recipe, world)
        manifest = Manifest(
            tasks=names, world_size=world, zero_stage=recipe.zero.stage, segments=(first,), device=device
        )
    if not resume or manifest.status == "finished":
        return manifest, resumed
    manifest = dataclasses.replace(manifest, status="running", restarts=manifest.restarts + 1)
    return dataclasses.replace(manifest, world_size=world, zero_stage=recipe.zero.stage, device=device), resumed


def _report_changes(resumed: Resumption, note: str, system: System, reporter: Reporter) -> None:
    """Report in one line that these ranks train unlike the ranks before, or unlike the recipe."""
    drawn = resumed.new_split and has_dropout(system.engine.model)
    dropout = "; dropout draws other random numbers than before, so the weights will not be exactly the same"
    reporter.message(note + (dropout if drawn else ""))


def _with_inputs(ledger: Ledger, system: System, resume: bool, reporter: Reporter) -> Manifest:
    """The manifest with digests of this run's inputs; rejects inputs that have changed (collective).

    For this, rank 0 reads the base model, a second time unless `state.digests` knows the files. Every rank digests the
    data that it has read itself, since each node may have its own copy.
    """
    manifest, folder = ledger.manifest, ledger.folder
    now = on_first_rank(lambda: read_inputs(system.recipe, system.sources))
    if manifest.inputs is None and resume and folder.manifest.exists():
        reporter.message(
            "an earlier release started this run and recorded no digests of its inputs: data, base model and tokenizer "
            "cannot be compared with the original ones; from now on, changes will be noticed"
        )
    before = manifest.inputs or now
    if before is None or now is None:
        return manifest
    fail_together(lambda: refuse_other_inputs(before, with_data(now, system.sources), system.sources, folder.path))
    changed = plugin_changes(before, now)
    if changed is not None:
        reporter.message(changed)
        ledger.log(event="plugins_changed", message=changed)
    return dataclasses.replace(manifest, inputs=dataclasses.replace(before, places=now.places, plugins=now.plugins))


@contextmanager
def _failure_noted(ledger: Ledger) -> Iterator[None]:
    """Record in the manifest of a run that has started that it failed; `--resume` continues from its saved state.

    A finished run stays finished: if a step after that fails, `--resume` repeats it.
    """
    try:
        yield
    except Interrupted:
        raise
    except Exception:
        if ledger.folder.manifest.exists() and ledger.manifest.status != "finished":
            with suppress(Exception):  # on a full disk, say: report the original error, not this one
                ledger.note_failure()
        raise
