"""The HTML page of a sweep: its table with means and deviations, and the scores over the stream by method."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from cl_dist.report import pictures
from cl_dist.report.blocks import Block, Cell, Fact, Facts, Figure, Page, Section, Table, Text, number
from cl_dist.report.drawing import Picture
from cl_dist.report.html import render
from cl_dist.report.page import definition
from cl_dist.report.sections import forgot_least
from cl_dist.report.write import HTML, check_out, rendered, write_files
from cl_dist.sweep.results import METRICS, CellResult, Results, Row
from cl_dist.sweep.tables import ALL_ORDERS, footnotes, seeds_done

Matrix = Sequence[Sequence[float | None]]

DRAWN = ("average_performance", "forgetting")
"""The metrics in the picture of the methods."""


def write_page(results: Results, recipe: str, out: Path, formats: Collection[str] = ()) -> Path:
    """Write `index.html` and the pictures into the folder `out`, and return the page's path.

    Raises:
        BadInput: `out` cannot be written.
        ClDistError: The disk is full.
    """
    check_out(out)
    files, vectors = rendered(_pictures(results), formats)
    html = render(sweep_page(results, recipe, list(files)), vectors)
    write_files(out, {HTML: html.encode(), **files})
    return out / HTML


def _pictures(results: Results) -> Iterator[tuple[str, Picture]]:
    panels = {
        results.columns[metric]: {
            _label(row, results): values for row in results.rows if (values := _values(row, metric))
        }
        for metric in DRAWN
    }
    if panels := {metric: values for metric, values in panels.items() if values}:
        yield "methods.png", pictures.ranges(panels)
    for place, order in enumerate(_orders(results)):
        curves = {row.method: matrix for row in results.rows if row.order == order and (matrix := _mean_matrix(row))}
        if curves:
            yield f"order_{place}.png", pictures.means(curves)


def _orders(results: Results) -> list[str]:
    return list(dict.fromkeys(row.order for row in results.rows))


def _values(row: Row, metric: str) -> list[float]:
    return [value for cell in row.finished if (value := cell.values.get(metric)) is not None]


def _mean_matrix(row: Row) -> Matrix:
    """The mean of the finished seeds' matrices, an entry None if one of them lacks it; empty without a finished seed,
    or if their tasks differ.
    """
    matrices = [cell.matrix for cell in row.finished if cell.matrix]
    if not matrices or len({cell.tasks for cell in row.finished}) > 1:
        return ()
    return [[_mean(scores) for scores in zip(*rows, strict=True)] for rows in zip(*matrices, strict=True)]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def _label(row: Row, results: Results) -> str:
    return f"{row.order} {row.method}" if len(_orders(results)) > 1 else row.method


def sweep_page(results: Results, recipe: str, files: Sequence[str]) -> Page:
    """The page."""
    done, cells = len(results.cells) - len(results.missing), len(results.cells)
    sections = [_summary(results), _table(results), _streams(results), _seeds(results), _definitions(results)]
    if results.missing:
        lines = [f"{_place(cell)}: {cell.state}" for cell in results.missing]
        sections.append(Section("missing", "What is missing", [Text(items=lines)]))
    links = {name: name for name in files} | {name: f"../{name}" for name in ("table.md", "table.csv", "table.tex")}
    return Page(f"Comparison on {recipe}", f"{done} of {cells} runs finished", sections, links)


def _summary(results: Results) -> Section:
    forgotten = _over_orders(results, "forgetting")
    blocks: list[Block] = []
    title = "No method has results yet"
    if forgotten:
        scores = {cell.kinds for cell in results.cells if cell.state.finished and cell.kinds}
        title = forgot_least(forgotten) + (" so far" if results.missing else "")
        if len(scores) > 1:
            title = "These runs cannot be compared by their means"
        performance = _over_orders(results, "average_performance")
        blocks.append(
            Facts(
                [
                    Fact(name, number(value, 3), f"AP {number(performance.get(name), 3)}")
                    for name, value in forgotten.items()
                ],
                equal=True,
            )
        )
        mixed = any("+" in kinds for kinds in scores)
        careful = " Both are means of different scores: look at each task instead." if mixed else ""
        orders = len(_orders(results))
        over = "seeds" if orders == 1 else f"seeds and {orders} orders"
        blocks.append(
            Text(
                f"Forgetting (F, Chaudhry et al. 2018: largest earlier score minus the last one) and average "
                f"performance, means over {over}.{careful}"
            )
        )
    blocks.append(
        Figure(
            "methods",
            "A dot for each finished seed; the mark is their mean, the line ± one sample standard deviation.",
            "Dots: AP and forgetting of each method and seed. The table below has the numbers.",
        )
    )
    blocks += [Text(items=notes)] if (notes := footnotes(results)) else []
    return Section("summary", title, blocks)


def _over_orders(results: Results, metric: str) -> Mapping[str, float]:
    """The metric by method: its mean, or the mean of the orders' means; without methods that lack it."""
    means = dict(results.over_orders()) or {row.method: {metric: row.mean(metric)} for row in results.rows}
    return {name: value for name, values in means.items() if (value := values.get(metric)) is not None}


def _table(results: Results) -> Section:
    columns = results.columns
    rows: list[list[str | Cell]] = [
        [row.method, row.order, seeds_done(row), *(_spread(row, name) for name in columns)] for row in results.rows
    ]
    rows += [
        [method, ALL_ORDERS, "", *(number(value) for value in values.values())]
        for method, values in results.over_orders()
    ]
    caption = "Mean ± sample standard deviation over the finished seeds; a single seed has no deviation"
    table = Table(caption, ["method", "order", "seeds", *columns.values()], rows, words=(1,))
    return Section("table", "All methods", [table])


def _spread(row: Row, metric: str) -> str:
    mean, deviation = row.mean(metric), row.deviation(metric)
    return number(mean) if mean is None or deviation is None else f"{number(mean)} ± {number(deviation)}"


def _streams(results: Results) -> Section:
    orders = [f", on order {order}" for order in _orders(results)] if len(_orders(results)) > 1 else [""]
    figures = [
        Figure(
            f"order_{place}",
            f"Mean score over the tasks trained so far, mean over the finished seeds{on}.",
            f"A line for each method{on}; the table has the last points as AP.",
        )
        for place, on in enumerate(orders)
    ]
    return Section("streams", "Scores over the stream", figures)


def _seeds(results: Results) -> Section:
    columns = results.columns
    rows = [
        [_place(cell), cell.state.status, *(number(cell.values.get(name)) for name in columns)]
        for cell in results.cells
    ]
    return Section(
        "runs", "Every run", [Table("Each run by seed", ["run", "status", *columns.values()], rows, words=(1,))]
    )


def _definitions(results: Results) -> Section:
    rows = [[label, name, definition(name).replace("`", "")] for name, label in (METRICS | results.columns).items()]
    return Section(
        "definitions", "Definitions", [Table("The columns", ["column", "metric", "definition"], rows, words=(1, 2))]
    )


def _place(cell: CellResult) -> str:
    return f"{cell.order} {cell.method} seed{cell.seed}"
