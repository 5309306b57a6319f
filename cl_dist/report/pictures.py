"""Draws the pictures of a report."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cl_dist.report.columns import columns_of_modules, columns_of_units
from cl_dist.report.drawing import (
    BLUE,
    DIVERGING,
    GREY,
    LIGHT,
    NUMBERED,
    ORANGE,
    PALE,
    SEQUENTIAL,
    WIDE,
    Picture,
    add_colour_bar,
    block_heat_map,
    cell_size,
    draw,
    fit,
    frame_cells,
    numbered_heat_map,
    row_height,
    short,
    thinned,
)
from cl_dist.report.reading import Losses
from cl_dist.report.units import Floats, Indices, UnitResults

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

Matrix = Sequence[Sequence[float | None]]

LEAST_IMPORTANCE = 1e-5
"""Lower end of the colour scale of importance, which spans many orders of magnitude."""
PANELS = 5
"""Panels per row."""
FURTHER = ("#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Colours of further lines, from Okabe and Ito's palette."""
MOST_POINTS = 4000
"""A picture has room for a curve of this many points."""
MOST_PANELS = 25
"""With more tasks than this, all scores share one panel."""


def accuracy_matrix(tasks: Sequence[str], matrix: Matrix, kinds: Mapping[str, str] | None = None) -> Picture:
    """The accuracy matrix. Rows: the model after each task, starting with the untouched model; columns: the task it is
    scored on. Frames mark the task that was just trained. Many tasks leave no room for numbers, hundreds none for
    frames. With several kinds of scores (`kinds`, by task), each kind has a colour scale of its own.
    """
    values = _as_array(matrix)
    kind = np.array([(kinds or {}).get(task, "") for task in tasks])
    several = len(set(kind)) > 1
    rows = ["untouched", *(f"after {name}" for name in tasks)][: len(values)]
    width, height = cell_size(*values.shape)

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        if several:
            shades = _shaded_by_kind(values, kind)
            image = numbered_heat_map(axes, values, rows, tasks, (SEQUENTIAL, _scale(shades)), shades)
        else:
            image = numbered_heat_map(axes, values, rows, tasks, (SEQUENTIAL, _scale(values)))
        frame_cells(axes, [(task, task + 1) for task in range(len(values) - 1)], (width, height))
        axes.set(xlabel="scored on", ylabel="model")
        if several:
            add_colour_bar(figure, image, axes, "score, on the scale of its own metric", ("worst", "best"))
        else:
            add_colour_bar(figure, image, axes, "score")

    return draw((2.8 + max(4, len(tasks)) * width, 1.3 + max(2, len(values)) * height), paint)


def scores(tasks: Sequence[str], matrix: Matrix, kinds: Mapping[str, str] | None = None) -> Picture:
    """A panel per task: its score over the stream, the other tasks' scores in grey, and a mark after its own training.
    Many tasks share one panel, in which the strong line is the mean over the trained tasks.

    With several kinds of scores (`kinds`, by task), a panel has its own scale, and the tasks of its kind only.
    """
    values = _as_array(matrix)
    if len(tasks) > MOST_PANELS:
        return _scores_of_many(values)
    columns = min(len(tasks), PANELS)
    rows = math.ceil(len(tasks) / columns)
    kind = np.array([(kinds or {}).get(task, "") for task in tasks])

    def paint(figure: Figure) -> None:
        grid = figure.subplots(rows, columns, sharex=True, sharey=len(set(kind)) == 1, squeeze=False)
        for panel, axes in enumerate(grid.flat):
            if panel >= len(tasks):
                axes.set_visible(False)
                continue
            alike = kind == kind[panel]
            _score_panel(axes, values, panel, np.flatnonzero(alike))
            _style_score_panels(np.array([axes]), values[:, alike], len(tasks))
            axes.set_title(short(tasks[panel]), fontsize=8)
        figure.supxlabel("tasks trained", fontsize=9)
        figure.supylabel("score", fontsize=9)

    return draw((max(4.5, 0.6 + 2.3 * columns), 0.7 + 1.8 * rows), paint)


def _score_panel(axes: Axes, values: Floats, task: int, others: Indices) -> None:
    for other in others:
        axes.plot(values[:, other], color=PALE, linewidth=0.8, zorder=1)
    axes.plot(values[:, task], color=BLUE, linewidth=1.6, marker="o", markersize=3, zorder=3)
    if task + 1 < len(values):
        axes.axvline(task + 1, color=ORANGE, linewidth=1.0, linestyle="--", zorder=2)
        axes.plot([task + 1], values[task + 1, task], color=ORANGE, marker="D", markersize=6, zorder=4)
    axes.tick_params(labelsize=8)


def _scores_of_many(values: Floats) -> Picture:
    """All tasks in one panel: their scores, the mean over the trained ones, and each score after its own training."""
    from matplotlib.collections import LineCollection

    steps = np.arange(len(values))
    lines = [np.column_stack([steps, values[:, task]]) for task in range(values.shape[1])]
    trained = np.arange(1, len(values))
    means = np.array([_mean(values[step, :step]) for step in trained])

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        axes.add_collection(LineCollection(lines, colors=PALE, linewidths=0.5, alpha=0.4, zorder=1))
        own = values[trained, trained - 1]
        axes.plot(trained, own, color=ORANGE, marker="D", markersize=2.5, linestyle="", zorder=2)
        axes.plot(trained, means, color=BLUE, linewidth=1.8, zorder=3)
        axes.autoscale()
        _style_score_panels(np.array([axes]), values, values.shape[1])
        axes.set(xlabel="tasks trained", ylabel="score")

    return draw((WIDE * 0.85, 4.0), paint)


def _mean(values: Floats) -> float:
    """Mean of the known values; NaN if there are none."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else math.nan


def _style_score_panels(grid: np.ndarray, values: Floats, tasks: int) -> None:
    from matplotlib.ticker import MaxNLocator

    for axes in grid.flat:
        axes.set_xlim(-0.3, tasks + 0.3)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        if _within_one(values):
            axes.set_ylim(-0.04, 1.04)


def means(runs: Mapping[str, Matrix]) -> Picture:
    """The mean score over the tasks trained so far, a line for each run; the matrices are by name of the run."""

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        everything = []
        for (name, matrix), style in zip(runs.items(), line_styles(), strict=False):
            values = _as_array(matrix)
            steps = range(1, len(values))
            shown = [_mean(values[step, :step]) for step in steps]
            everything += shown
            axes.plot(
                steps, shown, label=short(name), marker="o" if len(shown) <= NUMBERED else "", markersize=3.5, **style
            )
        _style_score_panels(np.array([axes]), np.array([everything]), max(len(matrix) - 1 for matrix in runs.values()))
        axes.set_xlim(left=0.7)  # before the first task there is nothing to take a mean of
        axes.set(xlabel="tasks trained", ylabel="mean score")
        axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))

    return draw((WIDE * 0.75, 4.0), paint)


def losses(runs: Mapping[str, tuple[Sequence[str], Mapping[str, Losses]]]) -> Picture:
    """The training loss of each run over the whole stream, as a moving mean over a hundredth of its steps; a run has
    its tasks and their losses.
    """

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        for (name, (tasks, of_task)), style in zip(runs.items(), line_styles(), strict=False):
            values = np.concatenate([_by_step(of_task[task]) for task in tasks if of_task.get(task)])
            steps, shown = thinned_curve(moving_mean(values, max(1, len(values) // 100)))
            axes.plot(steps + 1, shown, label=short(name), **style)
        axes.set(xlabel="optimiser step, over the whole stream", ylabel="training loss")
        axes.grid(axis="y", color=LIGHT, linewidth=0.6)
        axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))

    return draw((WIDE * 0.75, 3.6), paint)


def ranges(panels: Mapping[str, Mapping[str, Sequence[float]]]) -> Picture:
    """A panel for each metric: a row for each method with a dot per seed, and their mean ± sample standard deviation.

    The values are by metric and then by label of the row.
    """
    from matplotlib.ticker import MaxNLocator

    rows = list(dict.fromkeys(label for values in panels.values() for label in values))

    def paint(figure: Figure) -> None:
        grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, (metric, values) in zip(grid, panels.items(), strict=True):
            for place, label in enumerate(rows):
                _range(axes, place, np.array(values.get(label, [])))
            axes.set_title(metric, fontsize=9)
            axes.grid(axis="x", color=LIGHT, linewidth=0.6)
            axes.xaxis.set_major_locator(MaxNLocator(5))
            axes.tick_params(labelsize=8)
        grid[0].set_yticks(range(len(rows)), [short(label) for label in rows], fontsize=8)
        grid[0].set_ylim(len(rows) - 0.5, -0.5)

    return draw((2.0 + 3.0 * len(panels), 0.9 + 0.34 * max(2, len(rows))), paint)


def _range(axes: Axes, place: int, values: Floats) -> None:
    if not len(values):
        return
    deviation = float(values.std(ddof=1)) if len(values) > 1 else 0.0
    # The dots are below the line, whose ends would hide them.
    axes.plot(values, [place + 0.25] * len(values), color=GREY, marker="o", markersize=3, linestyle="", zorder=2)
    axes.errorbar(values.mean(), place, xerr=deviation, color=BLUE, marker="D", markersize=5, capsize=3, zorder=3)


def line_styles() -> Iterator[dict[str, Any]]:
    """Styles of lines that can be told apart by colour, and in print by their dashes."""
    for dashes in ("-", "--", ":"):
        for colour in (BLUE, ORANGE, *FURTHER):
            yield {"color": colour, "linestyle": dashes, "linewidth": 1.6}


def thinned_curve(values: Floats, most: int = MOST_POINTS) -> tuple[Indices, Floats]:
    """Places and values of a curve with at most about `most` points: the smallest and the largest one of each stretch
    of a longer curve, which looks the same.
    """
    length = math.ceil(len(values) / (most // 2))
    if length < 3:
        return np.arange(len(values)), values
    padded = np.full(math.ceil(len(values) / length) * length, np.nan)
    padded[: len(values)] = values
    stretches = padded.reshape(-1, length)
    starts = np.arange(len(stretches)) * length
    # A stretch without any value keeps its place as a gap.
    low = np.argmin(np.where(np.isnan(stretches), np.inf, stretches), axis=1)
    high = np.argmax(np.where(np.isnan(stretches), -np.inf, stretches), axis=1)
    places = np.unique(np.concatenate([starts + low, starts + high]))
    return places, padded[places]


def _by_step(losses: Losses) -> Floats:
    """`(steps,)` the losses of a task; NaN for steps without one."""
    values = np.full(max(losses), np.nan)
    values[np.array(list(losses)) - 1] = list(losses.values())
    return values


def loss(tasks: Sequence[str], losses: Mapping[str, Losses]) -> Picture:
    """Training loss over the optimiser steps of the whole stream, with lines between the tasks.

    For tasks with many steps, a moving mean over a twentieth of the steps is drawn on top of the single losses.
    """
    trained = [name for name in tasks if losses.get(name)]
    lengths = [max(losses[name]) for name in trained]
    starts = np.cumsum([0, *lengths])  # of each task, in steps of the whole stream

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        for start, length, name in zip(starts, lengths, trained, strict=False):
            _loss_of_task(axes, start, length, losses[name], len(trained))
        borders = starts[1:-1] + 0.5
        heights = axes.get_xaxis_transform()
        axes.vlines(borders, 0, 1, transform=heights, color=GREY, linewidth=min(0.8, 20 / len(starts)), linestyle="--")
        _style_loss(axes, starts, trained)

    return draw((WIDE * 0.85, 4.0), paint)


def _loss_of_task(axes: Axes, start: int, length: int, losses: Losses, tasks: int) -> None:
    values = _by_step(losses)
    window = length // 20
    most = max(200, MOST_POINTS // tasks)
    places, shown = thinned_curve(values, most)
    if window < 2:
        marker = "o" if length == 1 else ""
        axes.plot(start + 1 + places, shown, color=BLUE, linewidth=1.2, marker=marker, markersize=4)
        return
    axes.plot(start + 1 + places, shown, color=BLUE, alpha=0.3, linewidth=0.7)
    places, shown = thinned_curve(moving_mean(values, window), most)
    axes.plot(start + 1 + places, shown, color=BLUE, linewidth=1.6)


def moving_mean(values: Floats, window: int) -> Floats:
    """Mean over `window` neighbours, fewer at the ends; NaN is ignored."""
    known = ~np.isnan(values)
    ones = np.ones(window)
    # Sum and count separately, so that NaN and the ends, where there are fewer values, need no special case.
    counts = np.convolve(known.astype(float), ones, mode="same")
    sums = np.convolve(np.where(known, values, 0.0), ones, mode="same")
    return np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0.5)


def _style_loss(axes: Axes, starts: Floats, trained: Sequence[str]) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set(xlabel="optimiser step, over the whole stream", ylabel="training loss", xlim=(0.5, starts[-1] + 0.5))
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axes.grid(axis="y", color=LIGHT, linewidth=0.6)
    top = axes.secondary_xaxis("top")
    room = WIDE * 0.75 * float(np.diff(starts).min() / starts[-1])
    style: dict[str, Any] = {} if fit(trained, room) else {"rotation": 40, "ha": "left", "rotation_mode": "anchor"}
    shown = thinned(len(trained), WIDE * 0.75 / len(trained))
    places = ((starts[:-1] + starts[1:]) / 2 + 0.5)[list(shown)]
    top.set_xticks(places, [short(trained[each]) for each in shown], fontsize=8, **style)
    top.tick_params(length=0)


def unit_importance(tasks: Sequence[str], units: UnitResults) -> Picture:
    """Normalised importance on a logarithmic scale, by task and skill unit, or by module if there are many units."""
    from matplotlib.colors import LogNorm

    columns = columns_of_units(units.table)
    values = np.maximum(units.table.mean(units.importance, columns.of_piece, columns.count), LEAST_IMPORTANCE)

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        image = block_heat_map(axes, values, tasks, columns, (SEQUENTIAL, LogNorm(LEAST_IMPORTANCE, 1.0)))
        axes.set(xlabel=columns.what, ylabel="task")
        add_colour_bar(figure, image, axes, "importance (min-max)")

    return draw((WIDE, 2.0 + max(4, len(tasks)) * row_height(len(tasks))), paint)


def task_correlation(tasks: Sequence[str], correlations: Floats) -> Picture:
    """Pearson correlation of the tasks' unit scores; a dash if all scores of a task are equal."""
    from matplotlib.colors import Normalize

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        image = numbered_heat_map(axes, correlations, tasks, tasks, (DIVERGING, Normalize(-1.0, 1.0)))
        axes.set(xlabel="task", ylabel="task")
        add_colour_bar(figure, image, axes, "correlation of unit scores")

    width, height = cell_size(len(tasks), len(tasks))
    return draw((2.6 + max(4, len(tasks)) * width, 1.6 + max(4, len(tasks)) * height), paint)


def fusion(tasks: Sequence[str], units: UnitResults) -> Picture:
    """Share of the new weights by fused task (all but the first) and module, and of the old weights if the two do not
    add up to 1. One half is white; the scale ends at the share that is farthest from it.
    """
    columns = columns_of_modules(units.table)
    shares = {"share of the new weights": units.share_new[1:]}
    if units.shares_are_independent:
        shares["share of the old weights"] = units.share_old[1:]
    shown = {label: units.table.mean(values, columns.of_piece, columns.count) for label, values in shares.items()}
    scale = _around_half(np.stack(list(shown.values())))

    def paint(figure: Figure) -> None:
        panels = figure.subplots(len(shown), 1, squeeze=False)[:, 0]
        for axes, (label, values) in zip(panels, shown.items(), strict=True):
            image = block_heat_map(axes, values, tasks[1:], columns, (DIVERGING, scale))
            axes.set(xlabel=columns.what, ylabel="fused task")
            add_colour_bar(figure, image, axes, label)

    return draw((WIDE, (2.0 + max(4, len(tasks) - 1) * row_height(len(tasks) - 1)) * len(shown)), paint)


def _around_half(shares: Floats) -> Normalize:
    """A scale centred on 0.5 that spans at least a tenth, so that rounding does not look like a difference."""
    from matplotlib.colors import Normalize

    farthest = np.abs(shares[~np.isnan(shares)] - 0.5).max(initial=0.05)
    return Normalize(0.5 - farthest, 0.5 + farthest)


def _as_array(matrix: Matrix) -> Floats:
    return np.array([[math.nan if score is None else score for score in row] for row in matrix])


def _shaded_by_kind(values: Floats, kind: NDArray[np.str_]) -> Floats:
    """Where each score stands on the scale of its kind: 0 at the lower end, 1 at the upper one."""
    shades = np.full_like(values, math.nan)
    for each in np.unique(kind):
        alike = kind == each
        own = values[:, alike]
        scale = _scale(own)
        low, high = float(scale.vmin or 0.0), float(scale.vmax or 0.0)
        shades[:, alike] = (own - low) / (high - low) if high > low else np.where(np.isnan(own), math.nan, 1.0)
    return shades


def _scale(values: Floats) -> Normalize:
    """From the worst to the best score; for shares from 0 to 1, so that the pictures of two runs are comparable."""
    from matplotlib.colors import Normalize

    if _within_one(values) or np.isnan(values).all():
        return Normalize(0.0, 1.0)
    return Normalize(float(np.nanmin(values)), float(np.nanmax(values)))


def _within_one(values: Floats) -> bool:
    """Whether the scores are shares such as accuracies; log-likelihoods, for example, are negative."""
    known = values[~np.isnan(values)]
    return known.size > 0 and bool((known >= 0).all() and (known <= 1).all())
