"""From a recipe on every rank to a run that is under way: where it stands, and what is noted if it fails."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from cl_dist.assembly import System, build_system
from cl_dist.config.schema import Recipe
from cl_dist.coordinator.finish import finish
from cl_dist.coordinator.stream import Coordinator
from cl_dist.engine.broken import telling_broken_collectives
from cl_dist.engine.deadline import Deadline, SecondsLeft, no_limit
from cl_dist.engine.distributed import join
from cl_dist.engine.quiet import quiet_libraries
from cl_dist.errors import BadInput, Interrupted
from cl_dist.heartbeat import beat
from cl_dist.models.dropout import has_dropout
from cl_dist.progress import Reporter
from cl_dist.state.elastic import Resumption, resumption, segment, with_segments
from cl_dist.state.inputs import plugin_changes, read_inputs, refuse_other_inputs, with_data
from cl_dist.state.ledger import Ledger
from cl_dist.state.lock import RunLock
from cl_dist.state.manifest import Manifest
from cl_dist.state.run_folder import RunFolder
from cl_dist.state.together import by_first, together
from cl_dist.watchdog import End, Watchdog


def run(
    recipe: Recipe,
    recipe_dir: Path,
    *,
    resume: bool,
    reporter: Reporter,
    end: End,
    seconds_left: SecondsLeft = no_limit,
    told_once: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> dict[str, Any]:
    """Train the recipe's stream on this rank together with the others, and return the content of metrics.json.

    Args:
        recipe: The resolved recipe.
        recipe_dir: Folder that the recipe's relative paths start from.
        resume: Go on from the newest saved state in `recipe.output_dir`.
        reporter: Where progress is told.
        end: Ends this process at once, from another thread, where the job hangs.
        seconds_left: How long the job may still run, asked on rank 0; None: for ever.
        told_once: Around what rank 0 does for all: where it fails, all ranks raise the same, and one is to say so.

    Raises:
        BadInput: The recipe, its data or its model is not usable, or another run holds the folder.
        RankLost: Another rank has ended, or does not answer.
        JobFailed: The training has gone wrong.
        Interrupted: A signal asked the run to stop, or its time is nearly over; its state is saved.
    """
    rank, world = join(recipe.launch.timeout_seconds)
    quiet_libraries(rank)
    folder = RunFolder(Path(recipe.output_dir))
    with ExitStack() as stack:
        timeout = recipe.launch.timeout_seconds
        with telling_broken_collectives(rank, timeout, lambda reason, _: reason), told_once():
            beat("taking the run folder")
            together(lambda: _claim(folder, stack, reporter) if rank == 0 else None)
        watchdog = stack.enter_context(Watchdog(folder.logs, rank, world, recipe.launch.hang_seconds, end))
        stack.enter_context(telling_broken_collectives(rank, timeout, watchdog.give_up))
        with told_once():
            manifest, resumed = by_first(lambda: _starting_point(folder, recipe, world, resume))
        ledger = Ledger(folder, manifest, writer=rank == 0)
        if manifest.status == "finished":
            reporter.message("this run is finished already; nothing is left to do")
            return finish(ledger, reporter)
        with _failure_noted(ledger):
            system = build_system(resumed.recipe, recipe_dir)
            _tell_what_is_new(resumed, system, reporter)
            with told_once():
                ledger.manifest = _with_inputs(ledger, system, resume, reporter)
            deadline = Deadline(seconds_left if rank == 0 else no_limit)
            return Coordinator(system, ledger, reporter, deadline).run()


def _claim(folder: RunFolder, stack: ExitStack, reporter: Reporter) -> None:
    """Make the run folder this job's until `stack` ends; one rank does it."""
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        stack.enter_context(RunLock(folder.lock, reporter.message))
        folder.recover()
        Watchdog.prepare(folder.logs)
    except OSError as error:
        raise BadInput(f"the run folder {folder.path} cannot be used: {error}") from error


def _starting_point(folder: RunFolder, recipe: Recipe, world: int, resume: bool) -> tuple[Manifest, Resumption]:
    """Read or make the manifest, and the recipe as these ranks run it; one rank does it."""
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


def _with_inputs(ledger: Ledger, system: System, resume: bool, reporter: Reporter) -> Manifest:
    """The manifest with digests of what this run has read; refuses other inputs than before (collective).

    Rank 0 reads the base model for it, once more where `state.digests` does not know the files. Every rank digests the
    data that it has read itself: on several nodes each may have a copy.
    """
    manifest, folder = ledger.manifest, ledger.folder
    now = by_first(lambda: read_inputs(system.recipe, system.tasks))
    if manifest.inputs is None and resume and folder.manifest.exists():
        reporter.message(
            "an earlier release began this run and recorded no digests of its inputs: data, base model and tokenizer "
            "cannot be compared with what they were; from now on they will be"
        )
    before = manifest.inputs or now
    if before is None or now is None:
        return manifest
    together(lambda: refuse_other_inputs(before, with_data(now, system.tasks), system.tasks, folder.path))
    changed = plugin_changes(before, now)
    if changed is not None:
        reporter.message(changed)
        ledger.log(event="plugins_changed", message=changed)
    return dataclasses.replace(manifest, inputs=dataclasses.replace(before, places=now.places, plugins=now.plugins))


@contextmanager
def _failure_noted(ledger: Ledger) -> Iterator[None]:
    """Let the manifest of a run that has begun say that it failed; `--resume` goes on from what is saved.

    One that is finished stays so: what fails after that, `--resume` does again.
    """
    try:
        yield
    except Interrupted:
        raise
    except Exception:
        if ledger.folder.manifest.exists() and ledger.manifest.status != "finished":
            with suppress(Exception):  # a full disk, say: the first error is the one to tell
                ledger.note_failure()
        raise
