"""Writes run folders of a sweep's cells, as runs would."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cl_dist.config.load import dump_recipe
from cl_dist.evaluation.metrics import all_metrics
from cl_dist.state.ledger import Ledger
from cl_dist.state.manifest import Manifest
from cl_dist.sweep.grid import Cell, Grid, Request, build_grid
from tests.recipes import write_recipe

Matrix = Sequence[Sequence[float | None]]
METHODS = "sequential,migu"


def make_grid(folder: Path, methods: str | None = METHODS, seeds: str | None = "0,1", **rest: object) -> Grid:
    """A grid over two tiny tasks, its sweep in `folder/sweep`."""
    folder.mkdir(parents=True, exist_ok=True)
    return build_grid(
        Request(recipe=str(write_recipe(folder)), out=folder / "sweep", methods=methods, seeds=seeds, **rest)  # type: ignore[arg-type]
    )


def matrix(first: float, kept: float, second: float) -> Matrix:
    """Two tasks: a score of `first` on the first, which drops to `kept` after the second, learnt to `second`."""
    return ((0.0, 0.0), (first, 0.125), (kept, second))


def finish(cell: Cell, scores: Matrix, scoring: dict[str, dict[str, str | int]] | None = None) -> None:
    """Write the files of a finished run of this cell, with these scores."""
    ledger = _start(cell, scores, "finished", scoring)
    ledger.write_metrics({"accuracy_matrix": scores, **all_metrics(scores)})


def stop_half_way(cell: Cell, scores: Matrix, status: str = "interrupted") -> None:
    """Write the files of a run that was stopped after its first task."""
    _start(cell, scores[:2], status)


def _start(cell: Cell, scores: Matrix, status: str, scoring: dict[str, dict[str, str | int]] | None = None) -> Ledger:
    cell.folder.path.mkdir(parents=True)
    manifest = Manifest(
        tasks=tuple(task.name for task in cell.recipe.stream.tasks),
        world_size=cell.recipe.launch.processes,
        zero_stage=cell.recipe.zero.stage,
        status=status,  # type: ignore[arg-type]
        completed=len(scores) - 1,
        accuracy_matrix=tuple(tuple(row) for row in scores),
        scoring=scoring or {},
    )
    ledger = Ledger(cell.folder, manifest, writer=True)
    ledger.start(dump_recipe(cell.recipe))
    return ledger
