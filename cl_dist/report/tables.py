"""The tables of a report: CSV for programs, Markdown for readers."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from cl_dist.report.escape import Markdown, markdown_text
from cl_dist.report.units import Floats, UnitResults

FUSION_COLUMNS = ("new_mean", "new_min", "new_max", "old_mean", "old_min", "old_max")


def importance_csv(tasks: Sequence[str], units: UnitResults) -> str:
    """A line per skill unit: unit, modules, elements, and its normalised importance to each task."""
    table = units.table
    modules: list[list[str]] = [[] for _ in table.names]
    for unit, module in zip(table.unit.tolist(), table.module.tolist(), strict=True):
        modules[unit].append(table.modules[module])
    sizes = table.elements_of_units().tolist()
    columns = zip(table.names, modules, sizes, units.importance.T.tolist(), strict=True)
    lines = ([name, " ".join(owners), int(size), *map(_cell, scores)] for name, owners, size, scores in columns)
    return csv_text(["unit", "module", "elements", *tasks], lines)


def correlation_csv(tasks: Sequence[str], correlations: Floats) -> str:
    """A task-by-task matrix; cells are empty where the correlation is undefined."""
    lines = ([name, *map(_cell, row)] for name, row in zip(tasks, correlations.tolist(), strict=True))
    return csv_text(["task", *tasks], lines)


def fusion_csv(tasks: Sequence[str], units: UnitResults) -> str:
    """A line per task and module: mean (weighted by elements), smallest and largest share of new and of old weights."""
    table = units.table
    counts = np.bincount(table.module).tolist()
    sizes = np.bincount(table.module, table.elements).tolist()
    shares = []
    for values in (units.share_new, units.share_old):
        shares += [table.mean(values, table.module, len(table.modules)), *table.extremes(values)]
    cells = np.stack(shares, axis=-1).tolist()
    lines = (
        [task, module, count, int(size), *map(_cell, values)]
        for task, of_task in zip(tasks, cells, strict=True)
        for module, count, size, values in zip(table.modules, counts, sizes, of_task, strict=True)
    )
    return csv_text(["task", "module", "units", "elements", *FUSION_COLUMNS], lines)


def matrix_csv(tasks: Sequence[str], matrix: Sequence[Sequence[float | None]]) -> str:
    """A line per model, starting with the untouched one, and a column per scored task; empty: not evaluated."""
    places = ["untouched", *tasks]
    lines = (
        [place, *("" if score is None else score for score in row)] for place, row in zip(places, matrix, strict=False)
    )
    return csv_text(["after", *tasks], lines)


SCORING_COLUMNS = {
    "metric": "metric",
    "mode": "by",
    "scored_on": "split",
    "samples": "samples",
    "labels_from": "labels from",
    "answers_outside_labels": "answers outside the labels",
    "cut_generations": "answers cut",
}
"""Entries of `cl_dist.state.manifest.SCORING`, and the headings of their columns."""
COUNTED = ("samples", "answers outside the labels", "answers cut")
"""The headings of columns with numbers."""


def scoring_lines(
    tasks: Sequence[str], scoring: Mapping[str, Mapping[str, str | int]]
) -> tuple[list[str], list[list[str]]]:
    """How each task was last scored (the manifest's `scoring`): a header, and a line per evaluated task.

    A column that says nothing about any task is left out; `–` means that it does not apply to this one.
    """
    evaluated = [task for task in tasks if scoring.get(task)]
    columns = {name: head for name, head in SCORING_COLUMNS.items() if any(name in scoring[task] for task in evaluated)}
    lines = [[task, *(str(scoring[task].get(name, "–")) for name in columns)] for task in evaluated]
    return ["task", *columns.values()], lines


def general_names(measured: Sequence[Mapping[str, Any]]) -> list[str]:
    """Tasks of lm-evaluation-harness, in the order of their first measurement."""
    return list(dict.fromkeys(name for entry in measured for name in entry["scores"]))


def general_csv(measured: Sequence[Mapping[str, Any]]) -> str:
    """A line per measurement, task and metric of general ability (the manifest's `general`)."""
    lines = (
        [entry["after"], name, metric, value, values["samples"]]
        for entry in measured
        for name, values in entry["scores"].items()
        for metric, value in values["metrics"].items()
    )
    return csv_text(["after", "task", "metric", "value", "samples"], lines)


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]], text: Collection[int] = (0,)) -> str:
    """A Markdown table. Columns in `text` are left-aligned, the others, which are numbers, right-aligned. Cells are
    escaped unless they are `Markdown`.
    """
    rule = ["---" if column in text else "---:" for column in range(len(header))]
    cells = (
        [cell if isinstance(cell, Markdown) else markdown_text(cell) for cell in line] for line in [header, *lines]
    )
    rows = ["| " + " | ".join(line) + " |" for line in cells]
    return "\n".join([rows[0], "| " + " | ".join(rule) + " |", *rows[1:]])


def csv_text(header: Sequence[str], lines: Iterable[Sequence[str | int | float]]) -> str:
    """The text of a CSV file with these columns."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(lines)
    return file.getvalue()


def _cell(value: float) -> float | str:
    return "" if math.isnan(value) else value
