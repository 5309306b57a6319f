"""Which rows a method kept in each task: by layer, how stable within a task, and how much two tasks overlap.

Read from `kept_rows.safetensors` in the tasks' folders (docs/scoring.md): for each layer, in how many steps of the task
each row was kept. All measures follow from these counts. For a row that task a keeps in `c_a` of its `S_a` steps, let
`p_a = c_a / S_a`. In a layer of n rows, a random step keeps `n k_a` rows, where `k_a` is the mean of `p_a`, and:

- two random steps, one of task a and one of task b, have `m = sum p_a p_b` kept rows in common; two different steps of
  one task have `m = sum c (c - 1) / (S (S - 1))`;
- if each had drawn its rows at random, they would have `e = n k_a k_b` in common, and at most `h = n min(k_a, k_b)`;
- the overlap is `(m - e) / (h - e)`, as in Cohen's kappa: 1 if both always keep the same rows, 0 if they share as many
  as by chance. Within a task it is the stability of its rows. Over several layers, m, e and h are added up first.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from cl_dist.errors import BadInput
from cl_dist.report.columns import Columns, columns_of_modules
from cl_dist.report.drawing import (
    SEQUENTIAL,
    WIDE,
    Picture,
    add_colour_bar,
    block_heat_map,
    cell_size,
    draw,
    numbered_heat_map,
    row_height,
)
from cl_dist.report.tables import csv_text
from cl_dist.report.units import Floats, UnitTable, module_of
from cl_dist.state.run_folder import TaskFolder

MOSTLY = 0.9
"""A row counts as mostly kept if it is kept in this share of a task's steps or more."""

CAPTIONS = {
    "kept_rows.png": "Kept rows by layer. Top: the share of a layer's rows that a task kept at all, in at least "
    "one of its steps. Bottom: how stable the rows are within the task: 1 if every step keeps the same rows, 0 if two "
    "steps share no more rows than by chance. Grey: the task was trained without a mask.",
    "row_overlap.png": "How much the kept rows of two tasks overlap: 1 if all steps of both keep the same rows, 0 if a "
    "step of one and a step of the other share no more rows than by chance. On the diagonal: two steps of the same "
    "task. Two tasks that overlap about as much as each does with itself update the same rows.",
}
"""The caption of each picture, by file name."""


@dataclass(frozen=True)
class KeptRows:
    """The measures of the tasks that have a record; arrays have NaN where a measure is undefined."""

    tasks: tuple[str, ...]
    masked: tuple[bool, ...]
    """Whether each task was trained with masks; without, all its values are NaN."""
    recorded: tuple[tuple[int, int], ...]
    """For each task the first step (from 1) that its counts include, and the number of steps that they include."""
    layers: tuple[str, ...]
    """Names of the masked weights, in model order."""
    rows: Floats
    """`(layers,)` number of rows."""
    kept: Floats
    """`(tasks, layers)` mean share of the rows that a step keeps."""
    ever: Floats
    """`(tasks, layers)` share of the rows that at least one step keeps."""
    mostly: Floats
    """`(tasks, layers)` share of the rows that nine steps in ten or more keep."""
    stability: Floats
    """`(tasks, layers)` overlap of two steps of the task; undefined for fewer than two steps."""
    overlap: Floats
    """`(tasks, tasks)` overlap over all layers that both tasks have; the diagonal is the stability of a whole task."""
    shared: Floats
    """`(tasks, tasks)` not adjusted for chance: of the rows that a step of the row's task keeps, the share that a step
    of the column's task keeps too."""


def read_kept_rows(tasks: Sequence[str], folders: Sequence[TaskFolder]) -> KeptRows | None:
    """Measure the records of the finished `tasks`, which are in `folders`; None if there are none.

    A run that an older release began has records only from a later task on. One layer at a time is read from all files:
    memory stays small for hundreds of tasks.

    Raises:
        BadInput: A file is damaged.
    """
    found = [(name, folder.kept_rows) for name, folder in zip(tasks, folders, strict=True) if folder.kept_rows.exists()]
    if not found:
        return None
    with ExitStack() as stack:
        records = [stack.enter_context(_Record(name, path)) for name, path in found]
        return _measured(records)


class _Record:
    """One task's file. A context that keeps it open."""

    def __init__(self, task: str, path: Path) -> None:
        self.task, self._path = task, path
        self._stack = ExitStack()

    def __enter__(self) -> _Record:
        try:
            self._file = self._stack.enter_context(safe_open(self._path, framework="numpy"))
            about = json.loads((self._file.metadata() or {})["record"])
            self.masked = {True: True, False: False}[about["masked"]]
            self.first, self.steps = int(about["first_step"]), int(about["steps"])
            self.layers: Mapping[str, None] = dict.fromkeys(map(str, about["layers"]))
        except (OSError, SafetensorError) as error:
            raise BadInput(f"{self._path} is damaged: {error}") from error
        except (LookupError, ValueError, TypeError, RecursionError) as error:
            raise BadInput(f"{self._path} is damaged: it does not say how many steps it has counted") from error
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def counts(self, layer: str) -> Floats | None:
        """In how many steps each row of a layer was kept, `(rows,)`; None if the task has no such layer."""
        if layer not in self.layers or not self.masked or not self.steps:
            return None
        try:
            counts = self._file.get_tensor(layer).astype(np.float64)
        except (OSError, SafetensorError) as error:
            raise BadInput(f"{self._path} is damaged: {error}") from error
        if counts.ndim != 1 or not counts.size or counts.min() < 0 or counts.max() > self.steps:
            raise BadInput(f"{self._path} is damaged: {layer} has counts that {self.steps} steps cannot give")
        return counts


def _measured(records: Sequence[_Record]) -> KeptRows:
    layers = list(dict.fromkeys(layer for record in records for layer in record.layers))
    steps = np.array([float(record.steps) for record in records])
    count = len(records)
    kept, ever, mostly, stability = (np.full((count, len(layers)), np.nan) for _ in range(4))
    rows = np.zeros(len(layers))
    common, chance, most, own = (np.zeros((count, count)) for _ in range(4))
    for column, layer in enumerate(layers):
        counts, has = _counts_of(records, layer)
        if not has.any():
            continue
        rows[column] = counts.shape[1]
        shares = counts[has] / steps[has, None]
        means = shares.mean(axis=1)
        kept[has, column], ever[has, column] = means, (shares > 0).mean(axis=1)
        mostly[has, column] = (shares >= MOSTLY).mean(axis=1)
        # What a random step of each pair of tasks has in common; on the diagonal two different steps of one task.
        layer_common = shares @ shares.T
        np.fill_diagonal(layer_common, _pairs_within(counts[has], steps[has]))
        layer_chance = rows[column] * np.outer(means, means)
        layer_most = rows[column] * np.minimum.outer(means, means)
        stability[has, column] = _adjusted(*(each.diagonal() for each in (layer_common, layer_chance, layer_most)))
        here = np.ix_(has, has)
        for whole, part in ((common, layer_common), (chance, layer_chance), (most, layer_most)):
            whole[here] += part
        own[here] += rows[column] * means[:, None]
    return KeptRows(
        tasks=tuple(record.task for record in records),
        masked=tuple(record.masked for record in records),
        recorded=tuple((record.first, record.steps) for record in records),
        layers=tuple(layers),
        rows=rows,
        kept=kept,
        ever=ever,
        mostly=mostly,
        stability=stability,
        overlap=_adjusted(common, chance, most),
        shared=np.divide(common, own, out=np.full_like(own, np.nan), where=own > 0),
    )


def _counts_of(records: Sequence[_Record], layer: str) -> tuple[Floats, np.ndarray]:
    """All tasks' counts of a layer, `(tasks, rows)`, and which tasks have it; tasks without it have zeros."""
    found = [record.counts(layer) for record in records]
    sizes = {len(counts) for counts in found if counts is not None}
    if len(sizes) > 1:
        raise BadInput(f"the files of kept rows do not fit together: {layer} has {', '.join(map(str, sizes))} rows")
    empty = np.zeros(next(iter(sizes), 0))
    has = np.array([counts is not None for counts in found])
    return np.stack([empty if counts is None else counts for counts in found]), has


def _pairs_within(counts: Floats, steps: Floats) -> Floats:
    """`(tasks,)` rows that two different steps of a task have in common on average; NaN for a single step."""
    pairs = steps * (steps - 1)
    common: Floats = np.divide(
        (counts * (counts - 1)).sum(axis=1), pairs, out=np.full_like(pairs, np.nan), where=pairs > 0
    )
    return common


def _adjusted(common: Floats, chance: Floats, most: Floats) -> Floats:
    """The overlap, from what two steps have in common, by chance, and at most; NaN where chance is all there is."""
    room = most - chance
    adjusted: Floats = np.divide(common - chance, room, out=np.full_like(room, np.nan), where=room > 1e-9 * most)
    return adjusted


def kept_rows_csv(kept: KeptRows) -> str:
    """A line per task and layer; cells are empty where a measure is undefined."""
    header = ["task", "layer", "rows", "first_step", "steps", "kept", "ever_kept", "mostly_kept", "stability"]
    return csv_text(header, _layer_lines(kept))


def _layer_lines(kept: KeptRows) -> Iterator[list[str | int | float]]:
    for task, name in enumerate(kept.tasks):
        for column, layer in enumerate(kept.layers):
            values = [each[task, column] for each in (kept.kept, kept.ever, kept.mostly, kept.stability)]
            if not np.isnan(values[0]):
                yield [name, layer, int(kept.rows[column]), *kept.recorded[task], *map(_cell, values)]


def row_overlap_csv(kept: KeptRows) -> str:
    """A line per pair of tasks: the overlap, and the share of rows in common before the adjustment for chance."""
    lines = (
        [one, other, _cell(kept.overlap[row, column]), _cell(kept.shared[row, column])]
        for row, one in enumerate(kept.tasks)
        for column, other in enumerate(kept.tasks)
        if kept.masked[row] and kept.masked[column]
    )
    return csv_text(["task", "other_task", "overlap", "shared"], lines)


def _cell(value: float) -> float | str:
    return "" if np.isnan(value) else float(value)


def kept_rows_picture(kept: KeptRows) -> Picture:
    """Two panels by task and module: the share of rows that were ever kept, and the stability of the kept rows."""
    from matplotlib.colors import Normalize

    table, columns = _columns(kept)
    panels = {"rows kept at least once": kept.ever, "stability": kept.stability}
    shown = {label: _by_column(table, columns, values) for label, values in panels.items()}

    def paint(figure: Any) -> None:
        grid = figure.subplots(len(shown), 1, squeeze=False)[:, 0]
        for axes, (label, values) in zip(grid, shown.items(), strict=True):
            image = block_heat_map(axes, values, kept.tasks, columns, (SEQUENTIAL, Normalize(0.0, 1.0)))
            axes.set(xlabel="modules by kind, in each kind from the first layer to the last", ylabel="task")
            add_colour_bar(figure, image, axes, label)

    return draw((WIDE, (2.0 + max(4, len(kept.tasks)) * row_height(len(kept.tasks))) * len(shown)), paint)


def _columns(kept: KeptRows) -> tuple[UnitTable, Columns]:
    """The layers as units of their modules, and the columns of a picture."""
    modules = list(dict.fromkeys(map(module_of, kept.layers)))
    place = {module: number for number, module in enumerate(modules)}
    of_layer = np.array([place[module_of(layer)] for layer in kept.layers], dtype=np.int64)
    table = UnitTable(kept.layers, tuple(modules), np.arange(len(kept.layers)), of_layer, kept.rows)
    return table, columns_of_modules(table)


def _by_column(table: UnitTable, columns: Columns, values: Floats) -> Floats:
    """Mean of the layers' values in each column, weighted by their rows; layers without a value do not count."""
    known = ~np.isnan(values)
    sums = [
        np.bincount(columns.of_piece, np.where(has, row, 0) * table.elements, columns.count)
        for has, row in zip(known, values, strict=True)
    ]
    weights = [np.bincount(columns.of_piece, has * table.elements, columns.count) for has in known]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        means: Floats = np.array(sums) / np.where(np.array(weights) > 0, np.array(weights), np.nan)
    return means


def row_overlap_picture(kept: KeptRows) -> Picture:
    """The overlap of each pair of masked tasks; the stability of each task on the diagonal."""
    from matplotlib.colors import Normalize

    masked = np.flatnonzero(kept.masked)
    names = [kept.tasks[task] for task in masked]
    values = kept.overlap[np.ix_(masked, masked)]

    def paint(figure: Any) -> None:
        axes = figure.add_subplot()
        image = numbered_heat_map(axes, values, names, names, (SEQUENTIAL, Normalize(0.0, 1.0)))
        axes.set(xlabel="task", ylabel="task")
        add_colour_bar(figure, image, axes, "overlap of kept rows (0: by chance)")

    width, height = cell_size(len(names), len(names))
    return draw((2.6 + max(4, len(names)) * width, 1.6 + max(4, len(names)) * height), paint)
