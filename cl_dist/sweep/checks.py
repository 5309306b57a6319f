"""The state of each cell's run, and whether the runs in a sweep's folder belong to the current recipe."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cl_dist.config.schema import Recipe
from cl_dist.state.inputs import Inputs, input_changes
from cl_dist.state.lock import InUse, refuse_if_locked
from cl_dist.state.manifest import Manifest
from cl_dist.state.preflight import changed_settings
from cl_dist.state.run_folder import RunFolder
from cl_dist.state.stored_files import as_plain, stored_recipe
from cl_dist.sweep.folder import SweepFolder
from cl_dist.sweep.grid import Cell, Grid
from cl_dist.sweep.names import Problems

_ORDER_SETTINGS = ("stream.order", "stream.tasks")
"""Settings that differ between cells with different orders."""


@dataclass(frozen=True)
class CellState:
    """The progress of a run."""

    status: str
    """The manifest's status (finished, interrupted, failed), `killed`, `in use`, or `missing` without a run."""
    done: int = 0
    """Number of finished tasks."""
    tasks: int = 0
    """Number of tasks in the stream; 0 without a run."""

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""
        return self.status == "finished"

    def __str__(self) -> str:
        """`interrupted, 2 of 4 tasks done`."""
        partly = self.tasks and not self.finished
        return f"{self.status}, {self.done} of {self.tasks} tasks done" if partly else self.status


def state_of(folder: RunFolder) -> CellState:
    """Read the state of a run folder; `BadInput` if its manifest is damaged."""
    if not folder.manifest.exists():
        return CellState("in use" if _in_use(folder) else "missing")
    manifest = Manifest.read(folder.manifest)
    status: str = manifest.status
    if status != "finished" and _in_use(folder):
        status = "in use"
    elif status == "running":  # a killed run had no time to replace this status
        status = "killed"
    return CellState(status, manifest.completed, len(manifest.tasks))


def _in_use(folder: RunFolder) -> bool:
    try:
        refuse_if_locked(folder.lock)
    except InUse:
        return True
    return False


def refuse_other_recipes(sweep: SweepFolder, grid: Grid) -> None:
    """Raise `BadInput`, with a line per run, if runs in the sweep's folder differ from what this grid would run.

    One table must not mix results of different recipes.
    """
    problems = Problems()
    # First the recipe that all cells share, whether any of them has run or not.
    if sweep.base.exists():
        stored = stored_recipe(sweep.base)
        by_order = grid.base.stream.order is not None or stored.stream.order is not None
        ignored = ("method", "train.seed", *(_ORDER_SETTINGS if by_order else ()))
        # If the runs have digests of their inputs, compare those instead of the inputs' locations.
        digested = any(Manifest.read(RunFolder(sweep.run(*place)).manifest).inputs for place in sweep.found())
        differences = _differences(stored, _global_batch(stored), grid.base, ignored, digested=digested)
        _note(problems, sweep.base, differences)
    problems.check()
    # Then every run, including runs of cells that this grid does not have.
    for place in sweep.found():
        folder = RunFolder(sweep.run(*place))
        _note(problems, folder.path, _differences_at(folder, place, grid.cells))
    problems.check()
    _refuse_other_inputs(sweep, problems)


def _refuse_other_inputs(sweep: SweepFolder, problems: Problems) -> None:
    """Raise `BadInput` if runs on one order read different inputs although their settings name the same ones."""
    first: dict[str, tuple[RunFolder, Inputs]] = {}
    for place in sweep.found():
        folder = RunFolder(sweep.run(*place))
        inputs = Manifest.read(folder.manifest).inputs
        if inputs is None:
            continue
        other, theirs = first.setdefault(place[0], (folder, inputs))
        changes = input_changes(theirs, _comparable(inputs, theirs, folder, other))
        if changes:
            problems.add(
                f"{folder.path} and {other.path} read different inputs: {'; '.join(changes)}; one table must not mix "
                "results of different inputs: choose another --out"
            )
    problems.check()


def _comparable(inputs: Inputs, theirs: Inputs, folder: RunFolder, other: RunFolder) -> Inputs:
    """`inputs` without the differences from `theirs` that a method's own setting (`--set-for`) or the seed explains."""
    stored = [as_plain(stored_recipe(each.config)) for each in (other, folder)]
    changed = changed_settings(*stored, digested=True)
    if any(text.startswith("stream") for text in changed):
        inputs = replace(inputs, data=theirs.data)
    if stored[0]["model"] != stored[1]["model"]:
        inputs = replace(inputs, base_model=theirs.base_model, tokenizer=theirs.tokenizer)
    if list(inputs.base_model.files) == ["builtin"]:  # drawn from the seed
        inputs = replace(inputs, base_model=theirs.base_model)
    return inputs


def _differences_at(folder: RunFolder, place: tuple[str, str, int], cells: Sequence[Cell]) -> list[str]:
    """Differences between the run at a place (order, method, seed) and the cell that shares most of its place."""
    order, method, seed = place
    of_order = [cell for cell in cells if cell.order == order]
    of_method = [cell for cell in cells if cell.method == method]
    of_both = [cell for cell in of_order if cell.method == method]
    for cell in of_both:
        if cell.seed == seed:
            return _run_differences(folder, cell, ())
    if of_both:
        return _run_differences(folder, of_both[0], ("train.seed",))
    found = _run_differences(folder, of_method[0], (*_ORDER_SETTINGS, "train.seed")) if of_method else []
    if not of_order:
        return found
    # Cells of another method on the same order must have the same tasks, except for a method's own number of epochs.
    stored = as_plain(stored_recipe(folder.config))
    digested = Manifest.read(folder.manifest).inputs is not None
    changed = changed_settings(stored, as_plain(of_order[0].recipe), digested=digested)
    keys = {text: text.partition(":")[0] for text in changed}
    return found + [
        text for text, key in keys.items() if key.startswith("stream.tasks") and not key.endswith(".epochs")
    ]


def _note(problems: Problems, path: Path, differences: Iterable[str]) -> None:
    if text := "; ".join(differences):
        problems.add(f"the recipe differs from that of {path}: {text}; undo the change, or choose another --out")


def _run_differences(folder: RunFolder, cell: Cell, ignored: tuple[str, ...]) -> list[str]:
    manifest = Manifest.read(folder.manifest)
    stored = stored_recipe(folder.config)
    batch = manifest.segments[-1].global_batch if manifest.segments else _global_batch(stored)
    return _differences(stored, batch, cell.recipe, ignored, digested=manifest.inputs is not None)


def _differences(
    stored: Recipe, batch: int, wanted: Recipe, ignored: tuple[str, ...], *, digested: bool = False
) -> list[str]:
    """Differences that change results, as `key: old in the run, new now`; `digested` as in `changed_settings`."""
    changed = changed_settings(as_plain(stored), as_plain(wanted), digested=digested)
    found = [text for text in changed if not text.startswith(ignored)]
    # A resume keeps a run's global batch; in one table, all runs of a method must have the same.
    now = _global_batch(wanted)
    return found if batch == now else [*found, f"global batch: {batch} in the run, {now} now"]


def _global_batch(recipe: Recipe) -> int:
    ranks = recipe.launch.processes
    assert ranks != "auto", "the command replaces it by this machine's number"
    return recipe.train.micro_batch_size * recipe.train.gradient_accumulation * ranks
