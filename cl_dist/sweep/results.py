"""The results of a sweep, read only from its run folders."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from cl_dist.errors import BadInput
from cl_dist.evaluation.metrics import Matrix, all_metrics, forward_transfer_single
from cl_dist.methods.config import MethodConfig, Role
from cl_dist.progress import score_names
from cl_dist.state.manifest import Manifest
from cl_dist.state.run_folder import RunFolder
from cl_dist.state.stored_files import read_metrics, stored_recipe
from cl_dist.sweep.checks import CellState, state_of
from cl_dist.sweep.folder import SweepFolder

METRICS = {
    "average_performance": "AP",
    "backward_transfer": "BWT",
    "forgetting": "forgetting",
    "learning_accuracy": "learning accuracy",
    "forward_transfer_zero_shot": "FWT",
}
"""The metrics of the tables (functions of `cl_dist.evaluation.metrics`) and their column headings."""
SINGLE = "forward_transfer_single"
OPTIONAL_METRICS = {
    SINGLE: "FWT (single)",
    "general_ability": "general ability",
    "general_forgetting": "general forgetting",
}
"""Metrics that have a column only if a run has measured them, or if the sweep has the runs to compute them from."""

Place = tuple[str, str, int]
"""Order, method, seed."""
Values = Mapping[str, float | None]
"""Values by metric; None if missing or undefined."""


@dataclass(frozen=True)
class CellResult:
    """The results of one run."""

    order: str
    method: str
    seed: int
    state: CellState
    values: Values
    """All None if the run is not finished; None for metrics that have no meaning for its methods."""
    bound: MethodConfig | None = None
    """Its method, if that is a bound of the field's tables."""
    tasks: tuple[str, ...] = ()
    matrix: Matrix = ()
    """Accuracy matrix; empty if the run is not finished."""
    notes: tuple[str, ...] = ()
    """Notes that readers of the scores need."""
    scored_by: Mapping[str, str] = field(default_factory=dict)
    """The kind of each task's score, such as `exact_match`; empty if it is not recorded."""

    @property
    def kinds(self) -> str:
        """The kinds of scores that its metrics are means of: `exact_match`, or `exact_match + rouge_l`."""
        return " + ".join(sorted(set(self.scored_by.values())))


@dataclass(frozen=True)
class Row:
    """The runs of one method on one order."""

    order: str
    method: str
    cells: tuple[CellResult, ...]

    @property
    def finished(self) -> tuple[CellResult, ...]:
        """The finished runs, which are the ones that count."""
        return tuple(cell for cell in self.cells if cell.state.finished)

    def mean(self, metric: str) -> float | None:
        """Arithmetic mean over the finished seeds."""
        values = self._values(metric)
        return statistics.fmean(values) if values else None

    def deviation(self, metric: str) -> float | None:
        """Sample standard deviation (n - 1) over the finished seeds; None for fewer than two."""
        values = self._values(metric)
        return statistics.stdev(values) if len(values) > 1 else None

    def _values(self, metric: str) -> list[float]:
        """The metric of every finished seed; empty if one of them lacks it."""
        values = [cell.values.get(metric) for cell in self.finished]
        known = [value for value in values if value is not None]
        return known if len(known) == len(values) else []


@dataclass(frozen=True)
class Results:
    """All rows, in the order of the table."""

    rows: tuple[Row, ...]

    @property
    def columns(self) -> dict[str, str]:
        """The metrics in the tables, and their headings."""
        measured = {name for cell in self.cells for name, value in cell.values.items() if value is not None}
        return METRICS | {name: head for name, head in OPTIONAL_METRICS.items() if name in measured}

    @property
    def cells(self) -> list[CellResult]:
        """Every cell, row by row."""
        return [cell for row in self.rows for cell in row.cells]

    @property
    def missing(self) -> list[CellResult]:
        """Cells whose runs are not finished."""
        return [cell for cell in self.cells if not cell.state.finished]

    def over_orders(self) -> list[tuple[str, Values]]:
        """For every method, the mean of the orders' means; None if an order lacks it. Empty for a single order."""
        by_method: dict[str, list[Row]] = {}
        for row in self.rows:
            by_method.setdefault(row.method, []).append(row)
        orders = len({row.order for row in self.rows})
        return [
            (method, {name: _mean_of([row.mean(name) for row in rows], orders) for name in self.columns})
            for method, rows in by_method.items()
            if orders > 1
        ]


def _mean_of(values: Sequence[float | None], wanted: int) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if len(known) == wanted else None


def read_results(sweep: SweepFolder, asked: Iterable[Place]) -> Results:
    """Read every requested cell, and every other one in the sweep's folder."""
    places = list(dict.fromkeys([*asked, *sweep.found()]))
    cells = _against_single_tasks([_read_cell(sweep, *place) for place in places])
    # Orders and methods in the order in which they were requested, then those of earlier calls.
    orders = list(dict.fromkeys(place[0] for place in places))
    methods = list(dict.fromkeys(place[1] for place in places))
    rows = []
    for order in orders:
        for method in methods:
            own = [cell for cell in cells if (cell.order, cell.method) == (order, method)]
            if own:
                rows.append(Row(order, method, tuple(sorted(own, key=lambda cell: cell.seed))))
    return Results(tuple(rows))


def _against_single_tasks(cells: Sequence[CellResult]) -> list[CellResult]:
    """The same cells with the forward transfer relative to the run of their order and seed on single tasks."""
    single: dict[tuple[object, ...], list[CellResult]] = {}
    for cell in cells:
        if cell.bound is not None and Role.SINGLE in cell.bound.ROLES and cell.state.finished:
            single.setdefault((cell.order, cell.seed, cell.tasks), []).append(cell)
    return [_against(cell, single.get((cell.order, cell.seed, cell.tasks), ())) for cell in cells]


def _against(cell: CellResult, single: Sequence[CellResult]) -> CellResult:
    # With several such runs, of different settings say, it is unclear which one to compare with.
    if cell.bound is not None or not cell.matrix or len(single) != 1:
        return cell
    scores = [single[0].matrix[task + 1][task] for task in range(len(cell.tasks))]
    known = [score for score in scores if score is not None]
    transfer = forward_transfer_single(cell.matrix, known) if len(known) == len(scores) else None
    return replace(cell, values={**cell.values, SINGLE: transfer})


def _read_cell(sweep: SweepFolder, order: str, method: str, seed: int) -> CellResult:
    folder = RunFolder(sweep.run(order, method, seed))
    names = (*METRICS, *OPTIONAL_METRICS)
    try:
        state = state_of(folder)
    except BadInput:
        state = CellState("damaged")
    if not state.finished:
        return CellResult(order, method, seed, state, dict.fromkeys(names))
    values, methods, manifest = (
        _read_metrics(folder),
        stored_recipe(folder.config).method,
        Manifest.read(folder.manifest),
    )
    meaningless = {name for each in methods for name in each.MEANINGLESS}
    shown = {name: None if name in meaningless else values.get(name) for name in names}
    # Which bound a run is does not depend on what its row is called.
    bound = next((each for each in methods if Role.BOUND in each.ROLES), None)
    scored_by = score_names(manifest.scoring_by_task())
    matrix, notes = manifest.accuracy_matrix, tuple(manifest.notes)
    return CellResult(order, method, seed, state, shown, bound, manifest.tasks, matrix, notes, scored_by)


def _read_metrics(folder: RunFolder) -> Values:
    """The metrics of a finished run; computed from the manifest if there is no metrics.json (yet)."""
    if not folder.metrics.exists():
        return all_metrics(Manifest.read(folder.manifest).accuracy_matrix)
    return read_metrics(folder.metrics)
