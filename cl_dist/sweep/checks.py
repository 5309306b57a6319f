"""How far a cell's run is, and whether it is a run of the recipe that is asked for now."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cl_dist.config.schema import Recipe
from cl_dist.state.inputs import Inputs, input_changes
from cl_dist.state.lock import InUse, refuse_if_locked
from cl_dist.state.manifest import Manifest
from cl_dist.state.preflight import changed_settings
from cl_dist.state.run_folder import RunFolder
from cl_dist.state.stored_recipe import as_plain, stored_recipe
from cl_dist.sweep.folder import SweepFolder
from cl_dist.sweep.grid import Cell, Grid
from cl_dist.sweep.names import Problems

_OF_AN_ORDER = ("stream.order", "stream.tasks")
"""Settings in which cells of different orders differ."""


@dataclass(frozen=True)
class CellState:
    """How far a run is."""

    status: str
    """As the manifest has it (finished, interrupted, failed), `killed`, `in use`, or `missing` where there is none."""
    done: int = 0
    """Tasks that are done."""
    tasks: int = 0
    """Tasks of its stream; 0 where there is no run."""

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""
        return self.status == "finished"

    def __str__(self) -> str:
        """`interrupted, 2 of 4 tasks done`."""
        partly = self.tasks and not self.finished
        return f"{self.status}, {self.done} of {self.tasks} tasks done" if partly else self.status


def state_of(folder: RunFolder) -> CellState:
    """Look at a run folder; `BadInput` where its manifest is damaged."""
    if not folder.manifest.exists():
        return CellState("in use" if _in_use(folder) else "missing")
    manifest = Manifest.read(folder.manifest)
    status: str = manifest.status
    if status != "finished" and _in_use(folder):
        status = "in use"
    elif status == "running":  # it had no time to write anything else
        status = "killed"
    return CellState(status, manifest.completed, len(manifest.tasks))


def _in_use(folder: RunFolder) -> bool:
    try:
        refuse_if_locked(folder.lock)
    except InUse:
        return True
    return False


def refuse_other_recipes(sweep: SweepFolder, grid: Grid) -> None:
    """Raise `BadInput`, with a line for each, where runs in the sweep's folder are not what this grid would run.

    Results of different recipes must not meet in one table.
    """
    problems = Problems()
    if sweep.base.exists():
        stored = stored_recipe(sweep.base)
        by_order = grid.base.stream.order is not None or stored.stream.order is not None
        ignored = ("method", "train.seed", *(_OF_AN_ORDER if by_order else ()))
        # Where the sweep has runs that know their inputs, these are compared, wherever the inputs lie.
        digested = any(Manifest.read(RunFolder(sweep.run(*place)).manifest).inputs for place in sweep.found())
        differences = _differences(stored, _global_batch(stored), grid.base, ignored, digested=digested)
        _note(problems, sweep.base, differences)
    problems.check()
    for place in sweep.found():
        folder = RunFolder(sweep.run(*place))
        _note(problems, folder.path, _differences_at(folder, place, grid.cells))
    problems.check()
    _refuse_other_inputs(sweep, problems)


def _refuse_other_inputs(sweep: SweepFolder, problems: Problems) -> None:
    """Runs on one order whose settings name the same inputs must have been given the same, wherever these lay."""
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
                f"{folder.path} was given other inputs than {other.path}: {'; '.join(changes)}; results of different "
                "inputs do not belong in one table: choose another --out"
            )
    problems.check()


def _comparable(inputs: Inputs, theirs: Inputs, folder: RunFolder, other: RunFolder) -> Inputs:
    """`inputs`, but for what a setting of one method (`--set-for`) or the seed makes another than in `theirs`."""
    stored = [as_plain(stored_recipe(each.config)) for each in (other, folder)]
    told = changed_settings(*stored, digested=True)
    if any(text.startswith("stream") for text in told):
        inputs = replace(inputs, data=theirs.data)
    if stored[0]["model"] != stored[1]["model"]:
        inputs = replace(inputs, base_model=theirs.base_model, tokenizer=theirs.tokenizer)
    if list(inputs.base_model.files) == ["builtin"]:  # drawn from the seed
        inputs = replace(inputs, base_model=theirs.base_model)
    return inputs


def _differences_at(folder: RunFolder, place: tuple[str, str, int], cells: Sequence[Cell]) -> list[str]:
    """What differs between the run at a place (order, method, seed) and the cells that are nearest to it."""
    order, method, seed = place
    of_order = [cell for cell in cells if cell.order == order]
    of_method = [cell for cell in cells if cell.method == method]
    of_both = [cell for cell in of_order if cell.method == method]
    for cell in of_both:
        if cell.seed == seed:
            return _run_differences(folder, cell, ())
    if of_both:
        return _run_differences(folder, of_both[0], ("train.seed",))
    found = _run_differences(folder, of_method[0], (*_OF_AN_ORDER, "train.seed")) if of_method else []
    return found + (_other_tasks(folder, of_order[0]) if of_order else [])


def _other_tasks(folder: RunFolder, cell: Cell) -> list[str]:
    """How the tasks of a run of another method differ; a method may have its own number of epochs."""
    stored = as_plain(stored_recipe(folder.config))
    digested = Manifest.read(folder.manifest).inputs is not None
    changed = changed_settings(stored, as_plain(cell.recipe), digested=digested)
    keys = {text: text.partition(":")[0] for text in changed}
    return [text for text, key in keys.items() if key.startswith("stream.tasks") and not key.endswith(".epochs")]


def _note(problems: Problems, path: Path, differences: Iterable[str]) -> None:
    told = "; ".join(differences)
    if told:
        problems.add(f"the recipe is not the one of {path}: {told}; take the change back, or choose another --out")


def _run_differences(folder: RunFolder, cell: Cell, ignored: tuple[str, ...]) -> list[str]:
    manifest = Manifest.read(folder.manifest)
    stored = stored_recipe(folder.config)
    batch = manifest.segments[-1].global_batch if manifest.segments else _global_batch(stored)
    return _differences(stored, batch, cell.recipe, ignored, digested=manifest.inputs is not None)


def _differences(
    stored: Recipe, batch: int, wanted: Recipe, ignored: tuple[str, ...], *, digested: bool = False
) -> list[str]:
    """What differs and changes results, as `key: old in the run, new now`. digested: as for `changed_settings`."""
    changed = changed_settings(as_plain(stored), as_plain(wanted), digested=digested)
    found = [text for text in changed if not text.startswith(ignored)]
    now = _global_batch(wanted)
    return [*found, *_batch_difference(batch, now)]


def _batch_difference(before: int, now: int) -> Iterator[str]:
    """A resume keeps the global batch of a run; in a table it must be the same in all runs of a method."""
    if before != now:
        yield f"global batch: {before} in the run, {now} now"


def _global_batch(recipe: Recipe) -> int:
    return recipe.train.micro_batch_size * recipe.train.gradient_accumulation * recipe.launch.processes
