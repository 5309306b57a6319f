"""How far a cell's run is, and whether it is a run of the recipe that is asked for now."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cl_dist.config.schema import Recipe
from cl_dist.state.lock import InUse, refuse_if_locked
from cl_dist.state.manifest import Manifest
from cl_dist.state.preflight import changed_settings
from cl_dist.state.run_folder import RunFolder
from cl_dist.state.stored_recipe import as_plain, stored_recipe
from cl_dist.sweep.folder import SweepFolder
from cl_dist.sweep.grid import Cell, Grid
from cl_dist.sweep.names import Problems

_OF_A_CELL = ("method", "stream.order", "stream.tasks", "train.seed")
"""Settings in which the cells of one sweep differ."""
_OF_A_METHOD = ("stream.order", "stream.tasks", "train.seed")
"""Settings in which the cells of one method differ."""


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
        _note(problems, sweep.base, _differences(stored, _global_batch(stored), grid.base, _OF_A_CELL))
    problems.check()
    asked = {(cell.order, cell.method, cell.seed): cell for cell in grid.cells}
    of_method = {cell.method: cell for cell in grid.cells}
    for place in sweep.found():
        cell = asked.get(place)
        like = cell or of_method.get(place[1])
        if like is not None:
            folder = RunFolder(sweep.run(*place))
            ignored = () if cell is not None else _OF_A_METHOD
            _note(problems, folder.path, _run_differences(folder, like, ignored))
    problems.check()


def _note(problems: Problems, path: Path, differences: Iterable[str]) -> None:
    told = "; ".join(differences)
    if told:
        problems.add(f"the recipe is not the one of {path}: {told}; take the change back, or choose another --out")


def _run_differences(folder: RunFolder, cell: Cell, ignored: tuple[str, ...]) -> list[str]:
    manifest = Manifest.read(folder.manifest)
    stored = stored_recipe(folder.config)
    batch = manifest.segments[-1].global_batch if manifest.segments else _global_batch(stored)
    return _differences(stored, batch, cell.recipe, ignored)


def _differences(stored: Recipe, batch: int, wanted: Recipe, ignored: tuple[str, ...]) -> list[str]:
    """What differs and changes results, as `key: old in the run, new now`."""
    found = [text for text in changed_settings(as_plain(stored), as_plain(wanted)) if not text.startswith(ignored)]
    now = _global_batch(wanted)
    return [*found, *_batch_difference(batch, now)]


def _batch_difference(before: int, now: int) -> Iterator[str]:
    """A resume keeps the global batch of a run; in a table it must be the same in all runs of a method."""
    if before != now:
        yield f"global batch: {before} in the run, {now} now"


def _global_batch(recipe: Recipe) -> int:
    return recipe.train.micro_batch_size * recipe.train.gradient_accumulation * recipe.launch.processes
