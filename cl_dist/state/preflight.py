"""Whether a recipe may run in a folder, checked before any model is built. Imports nothing heavy."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from cl_dist.config.boundary import refusing
from cl_dist.config.formats import format_inputs
from cl_dist.config.schema import Recipe
from cl_dist.config.words import listed, show_path
from cl_dist.errors import BadInput
from cl_dist.methods.catalogue import method_inputs
from cl_dist.state.atomic import make_folder
from cl_dist.state.elastic import resumption, with_segments
from cl_dist.state.inputs import INPUT_SETTINGS, Inputs, refuse_other_inputs
from cl_dist.state.lock import Notify, RunLock, refuse_if_locked
from cl_dist.state.manifest import Manifest
from cl_dist.state.run_folder import RunFolder
from cl_dist.state.stored_files import as_plain, stored_recipe
from cl_dist.tasks.types import Task

FREE_SETTINGS = (
    "launch",
    "output_dir",
    "checkpoint",
    "eval.batch_size",
    "eval.gather_weights",
    "zero.stage",
    "zero.offload",
    "zero.deepspeed.zero_optimization",
    "train.micro_batch_size",
    "train.gradient_accumulation",
    "train.max_skipped_steps",
    "train.check_replicas_every",
    "plugins",
    "track",
)
"""Settings that may differ on resume: they change how a run is executed, not what a step computes (`elastic` keeps the
product of micro_batch_size, gradient_accumulation and ranks)."""

LONGEST_PATH = 3500
"""In bytes: Linux limits paths to 4096, and a run's files are up to four folders deeper."""

_SHOWN_DIFFERENCES = 8
_POSITION = re.compile(r"\[\d+\]")


def preflight(
    output_dir: Path,
    recipe: Recipe,
    *,
    resume: bool,
    fresh: bool,
    world_size: int | None = None,
    notify: Notify | None = None,
    tasks: Sequence[Task] = (),
    inputs: Callable[[], Inputs | None] | None = None,
) -> None:
    """Raise `BadInput` unless `recipe` may run in `output_dir`; makes the folder and its parents if necessary.

    Args:
        output_dir: The run folder.
        recipe: The resolved recipe.
        resume: Continue the run in the folder.
        fresh: Start anew; the caller puts the old run aside afterwards (`set_aside`).
        world_size: Number of ranks, if known.
        notify: Called when a requeued job waits for the lock of its predecessor (see `RunLock`).
        tasks: The recipe's data, as read.
        inputs: Digests the data and the base model (`state.inputs.read_inputs`). Called only if there is a run to
            compare them with.
    """
    if resume and fresh:
        raise BadInput("--resume and --fresh exclude each other: continue the old run, or put it aside")
    with refusing("output_dir"):
        folder = RunFolder(output_dir)
        # The folder itself. A resume must not make one.
        if resume and not os.path.exists(output_dir):
            raise BadInput(_nothing_to_resume(folder))
        _require_folder(output_dir)
        _require_writable(output_dir)
        # What is in it: nothing, or a run that no other process is working on.
        _require_run_or_empty(folder)
        refuse_if_locked(folder.lock, notify)
        # Whether that run is the one that the recipe continues.
        if resume:
            _require_resumable(folder, recipe, world_size)
            _require_same_inputs(folder, tasks, inputs)
        elif folder.manifest.exists() and not fresh:
            manifest = Manifest.read(folder.manifest)
            raise BadInput(
                f"{output_dir} holds a run already ({manifest.completed} of {len(manifest.tasks)} tasks done): "
                "continue it with --resume, or put it aside with --fresh and start anew"
            )


def set_aside(output_dir: Path) -> Path | None:
    """Rename the run in `output_dir` to `<name>.old-<time>` and return the new path; None if there is no run.

    Raises `BadInput` if the run is in use or the folder cannot be renamed.
    """
    folder = RunFolder(output_dir)
    if not folder.manifest.exists():
        return None
    with RunLock(folder.lock):
        target = _unused(output_dir.absolute(), f"{datetime.now():%Y%m%d-%H%M%S}")
        try:
            output_dir.absolute().rename(target)
        except OSError as error:
            raise BadInput(f"--fresh: {output_dir} cannot be renamed to {target.name}: {error.strerror}") from error
    return target


def put_back(aside: Path, output_dir: Path) -> None:
    """Undo `set_aside`, and delete what is in `output_dir` now. Call this only if no new run has started there."""
    shutil.rmtree(output_dir, ignore_errors=True)
    aside.rename(output_dir)


def _unused(output_dir: Path, stamp: str) -> Path:
    """An unused name for the old run: two runs may be put aside within a second."""
    target, count = output_dir.with_name(f"{output_dir.name}.old-{stamp}"), 1
    while target.exists():
        count += 1
        target = output_dir.with_name(f"{output_dir.name}.old-{stamp}-{count}")
    return target


def _require_folder(output_dir: Path) -> None:
    """Make the folder. Raises `BadInput` if that is impossible, or if the paths of files in it would be too long."""
    length = len(os.fsencode(output_dir.absolute()))
    if length > LONGEST_PATH:
        raise BadInput(
            f"output_dir {show_path(output_dir)} is a path of {length} bytes; allowed: at most {LONGEST_PATH}, since "
            "the files in it have longer paths"
        )
    if os.path.exists(output_dir) and not os.path.isdir(output_dir):
        kind = "a file" if output_dir.is_file() else "not a folder"
        raise BadInput(f"output_dir {output_dir} is {kind}; it must be a folder or an unused path")
    try:
        make_folder(output_dir)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise BadInput(f"output_dir {show_path(output_dir)} cannot be created: {reason}") from error


def _require_writable(output_dir: Path) -> None:
    """Try to create a file in the folder: that reveals permissions, quotas and read-only mounts."""
    try:
        with tempfile.TemporaryFile(dir=output_dir):
            pass
    except OSError as error:
        raise BadInput(f"output_dir {output_dir} is not writable: {error.strerror}") from error


def _require_run_or_empty(folder: RunFolder) -> None:
    """Refuse a folder with foreign files: it must hold a run, even one killed before its first manifest, or nothing."""
    if folder.manifest.exists() or _was_started(folder):
        return
    names = sorted(path.name for path in folder.path.iterdir() if path != folder.slurm)
    if names:
        raise BadInput(
            f"output_dir {folder.path} holds {names[0]} but no manifest.json, so it is not a run folder: "
            "choose an unused path or an empty folder"
        )


def _was_started(folder: RunFolder) -> bool:
    """Whether a run locked this folder and was killed before it wrote a manifest."""
    own = {folder.lock, folder.config, folder.log, folder.logs, folder.slurm}
    unfinished = (".config.yaml.tmp-", ".manifest.json.tmp-")
    files = folder.path.iterdir()
    return folder.lock.exists() and all(path in own or path.name.startswith(unfinished) for path in files)


def _nothing_to_resume(folder: RunFolder) -> str:
    return f"--resume: {folder.path} holds no run; leave --resume out to start one"


def _require_resumable(folder: RunFolder, recipe: Recipe, world_size: int | None) -> None:
    """Refuse to resume if there is no run, or a run of a different recipe."""
    if not folder.manifest.exists():
        if _was_started(folder):  # nothing was done yet, so the run simply starts
            return
        raise BadInput(_nothing_to_resume(folder))
    manifest = Manifest.read(folder.manifest)
    differences = changed_settings(
        as_plain(stored_recipe(folder.config)), as_plain(recipe), digested=manifest.inputs is not None
    )
    if differences:
        shown = listed(differences, _SHOWN_DIFFERENCES, separator="; ")
        advice = ""
        if manifest.inputs is None:  # the differences may not be the user's
            advice = (
                "; an earlier release started this run, perhaps with other defaults: set the run's values with --set"
            )
        raise BadInput(
            f"--resume: the recipe is not the one that {folder.path} was started with: {shown}; "
            f"only {', '.join(FREE_SETTINGS)} may differ{advice}"
        )
    if world_size is not None and manifest.status != "finished":
        before = with_segments(manifest, folder.config).segments[-1]
        resumption(recipe, before, world_size, folder.path)


def _require_same_inputs(folder: RunFolder, tasks: Sequence[Task], inputs: Callable[[], Inputs | None] | None) -> None:
    """Refuse to resume with a different data set, base model or tokenizer."""
    if inputs is None or not folder.manifest.exists():
        return
    before = Manifest.read(folder.manifest).inputs
    now = inputs() if before is not None else None
    if before is not None and now is not None:
        refuse_other_inputs(before, now, tasks, folder.path)


def changed_settings(stored: Mapping[str, Any], wanted: Mapping[str, Any], *, digested: bool = False) -> list[str]:
    """The differences between two recipes (plain dicts) that affect results, as `key: old in the run, new now`.

    If the run's inputs are `digested`, their paths may differ.
    """
    old, new = dict(_settings(stored)), dict(_settings(wanted))
    return [
        f"{key}: {_shown(old, key)} in the run, {_shown(new, key)} now"
        for key in dict.fromkeys([*old, *new])
        if not _is_free(key)
        and not (digested and _is_input(key))
        and (key not in old or key not in new or old[key] != new[key])
    ]


def _settings(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf of a nested recipe with its dotted key, such as `stream.tasks[0].name`. Empty mappings have none."""
    if isinstance(value, Mapping):
        for name, entry in value.items():
            yield from _settings(entry, f"{key}.{name}" if key else str(name))
    elif isinstance(value, Sequence) and not isinstance(value, str) and value:
        for position, entry in enumerate(value):
            yield from _settings(entry, f"{key}[{position}]")
    else:
        yield key, value


def _is_free(key: str) -> bool:
    """Whether a setting, or the component it belongs to, may differ on resume."""
    return any(key == free or key.startswith((f"{free}.", f"{free}[")) for free in FREE_SETTINGS)


def _is_input(key: str) -> bool:
    """Whether a setting says where an input is or how to read it."""
    return _POSITION.sub("[]", key) in {*INPUT_SETTINGS, *format_inputs(), *method_inputs()}


def _shown(settings: Mapping[str, Any], key: str) -> str:
    """A setting's value for a message."""
    return repr(settings[key]) if key in settings else "not set"
