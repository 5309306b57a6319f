"""Renders a sweep's table.md, table.csv and table.tex."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from cl_dist.report.escape import escape_latex, markdown_line, markdown_text
from cl_dist.report.page import definition
from cl_dist.report.tables import csv_text, markdown
from cl_dist.sweep.results import CellResult, Results, Row, Values

NOTHING = "–"
"""Shown in place of a missing number."""
ALL_ORDERS = "mean of orders"


def render_tables(results: Results, recipe: str) -> dict[str, str]:
    """The three files by name; `recipe` is in the heading."""
    return {
        "table.md": markdown_page(results, recipe),
        "table.csv": csv_table(results),
        "table.tex": latex_table(results),
    }


def markdown_page(results: Results, recipe: str) -> str:
    """The table for readers, with the definitions of its columns and the missing results."""
    columns = results.columns
    header = ["order", "method", "seeds", *columns.values()]
    lines = [[row.order, row.method, seeds_done(row), *_cells(row, columns, " ± ")] for row in results.rows]
    lines += [[ALL_ORDERS, method, "", *_plain(values)] for method, values in results.over_orders()]
    parts = [
        f"# Comparison on {markdown_text(recipe)}",
        markdown(header, lines, text=(0, 1)),
        "Mean ± sample standard deviation over the finished seeds; a single seed has no deviation.",
        "\n".join(f"- {label}: `{name}`. {definition(name)}" for name, label in columns.items()),
    ]
    parts[3:3] = map(markdown_line, _footnotes(results))
    if results.missing:
        missing = (f"- {_place(cell)}: {cell.state}" for cell in results.missing)
        parts += ["## What is missing", "\n".join(missing)]
    return "\n\n".join(parts) + "\n"


def csv_table(results: Results) -> str:
    """A line per cell, with its seed, and two lines per row, with `mean` and `std` in the seed column."""
    header = ["order", "method", "seed", "n", "status", *results.columns, "scored_by"]
    return csv_text(header, _csv_lines(results))


def _csv_lines(results: Results) -> Iterator[list[str | int | float]]:
    columns = results.columns
    for row in results.rows:
        for cell in row.cells:
            values = (cell.values.get(name) for name in columns)
            yield [row.order, row.method, cell.seed, "", cell.state.status, *map(_raw, values), cell.kinds]
    for row in results.rows:
        count, kinds = len(row.finished), _kinds(row.finished)
        yield [row.order, row.method, "mean", count, "", *(_raw(row.mean(name)) for name in columns), kinds]
        yield [row.order, row.method, "std", count, "", *(_raw(row.deviation(name)) for name in columns), kinds]
    for method, means in results.over_orders():
        kinds = _kinds(cell for row in results.rows if row.method == method for cell in row.finished)
        yield [ALL_ORDERS, method, "mean", "", "", *map(_raw, means.values()), kinds]


def _kinds(cells: Iterable[CellResult]) -> str:
    """The kinds of scores of several runs: `exact_match`, or `exact_match | rouge_l` if the runs differ."""
    return " | ".join(dict.fromkeys(cell.kinds for cell in cells if cell.kinds))


def latex_table(results: Results) -> str:
    """A booktabs table with rules between the orders."""
    columns = results.columns
    lines = [
        r"% needs \usepackage{booktabs}; mean and sample standard deviation over the finished seeds",
        rf"\begin{{tabular}}{{llr{'r' * len(columns)}}}",
        r"\toprule",
        _latex_line(["order", "method", "seeds", *columns.values()]),
    ]
    last = None
    for row in results.rows:
        lines += [r"\midrule"] if row.order != last else []
        last = row.order
        lines.append(_latex_line([row.order, row.method, seeds_done(row)], _cells(row, columns, r" \pm ")))
    averages = results.over_orders()
    lines += [r"\midrule"] if averages else []
    lines += [_latex_line([ALL_ORDERS, method, ""], _plain(values)) for method, values in averages]
    lines.append(r"\bottomrule")
    span = len(columns) + 3
    lines += [rf"\multicolumn{{{span}}}{{l}}{{{escape_latex(note)}}} \\" for note in _footnotes(results)]
    return "\n".join([*lines, r"\end{tabular}"]) + "\n"


def _footnotes(results: Results) -> list[str]:
    """Notes on rows that are bounds, and on how tasks were scored."""
    bounds = {cell.method: cell.bound.TABLE_NOTE for cell in results.cells if cell.bound is not None}
    return [*(f"{name} {note}." for name, note in bounds.items() if note is not None), *_score_notes(results)]


def _score_notes(results: Results) -> Iterator[str]:
    """Each note once, with the runs that it applies to."""
    finished = [cell for cell in results.cells if cell.state.finished]
    for note in dict.fromkeys(note for cell in finished for note in cell.notes):
        cells = [f"{cell.order} {cell.method} seed{cell.seed}" for cell in finished if note in cell.notes]
        whose = "All runs" if len(cells) == len(finished) else ", ".join(cells)
        yield f"{whose}: {note}."
    kinds: dict[str, list[str]] = {}
    for cell in finished:
        if cell.kinds:
            kinds.setdefault(cell.kinds, []).append(f"{cell.order} {cell.method} seed{cell.seed}")
    if len(kinds) > 1:
        listed = "; ".join(f"{kind}: {', '.join(cells)}" for kind, cells in kinds.items())
        yield f"The runs have different scores, so their metrics are not comparable: {listed}."


def _place(cell: CellResult) -> str:
    return markdown_text(f"{cell.order} {cell.method} seed{cell.seed}")


def seeds_done(row: Row) -> str:
    """`3`, or `2 of 3` where some are missing."""
    done, asked = len(row.finished), len(row.cells)
    return str(done) if done == asked else f"{done} of {asked}"


def _latex_line(words: list[str], numbers: list[str] | None = None) -> str:
    shown = [f"${number}$" if number != NOTHING else "--" for number in numbers or []]
    return " & ".join([*map(escape_latex, words), *shown]) + r" \\"


def _cells(row: Row, columns: Iterable[str], sign: str) -> list[str]:
    """Mean and deviation of every metric."""
    return [_with_deviation(row.mean(name), row.deviation(name), sign) for name in columns]


def _plain(values: Values) -> list[str]:
    return [_with_deviation(value, None, "") for value in values.values()]


def _with_deviation(mean: float | None, deviation: float | None, sign: str) -> str:
    if mean is None:
        return NOTHING
    return f"{mean:.4f}" if deviation is None else f"{mean:.4f}{sign}{deviation:.4f}"


def _raw(value: float | None) -> float | str:
    return "" if value is None else value
