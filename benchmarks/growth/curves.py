"""Results as CSV, and pictures of how something grows."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cl_dist.report.drawing import BLUE, GREY, LIGHT, ORANGE, draw

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[2]
RESULTS, PICTURES = ROOT / "benchmarks" / "results", ROOT / "docs" / "results"
COLOURS = (GREY, BLUE, ORANGE, "#009e73")
"""The last is from the same palette as blue and orange."""
SHAPES = "osD^"
PANEL = (4.2, 3.2)
"""Inches."""

Row = Mapping[str, float]


@dataclass(frozen=True)
class Panel:
    """One diagram: columns of the rows over another column, both on logarithmic scales unless `linear`."""

    title: str
    y: str
    lines: Mapping[str, str]
    """Label of a line by its column."""
    linear: bool = False
    spread: bool = False
    """Whether columns `<name>, least` and `<name>, most` bound each line."""


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Write the rows, with four significant digits."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: _short(value) for name, value in row.items()} for row in rows)


def _short(value: float) -> str:
    return f"{value:.0f}" if value == int(value) else f"{value:.4g}"


def read_csv(path: Path) -> list[dict[str, float]]:
    """The rows that `write_csv` wrote."""
    with path.open(encoding="utf-8", newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def publish(
    name: str,
    rows: Sequence[Row],
    over: str,
    panels: Sequence[Panel],
    folders: tuple[Path, Path] = (RESULTS, PICTURES),
) -> None:
    """Write a CSV file and a picture. Rows that are already in the file stay if none of the new ones replaces them."""
    results, pictures = folders[0] / f"{name}.csv", folders[1] / f"{name}.png"
    before = read_csv(results) if results.exists() else []
    merged = {row[over]: row for row in (*before, *rows)}
    write_csv(results, [merged[value] for value in sorted(merged)])
    pictures.write_bytes(picture(read_csv(results), over, panels))


def picture(rows: Sequence[Row], over: str, panels: Sequence[Panel]) -> bytes:
    """A PNG with the panels side by side, all over the column `over`."""
    # A label has the same colour and shape in every panel.
    labels = list(dict.fromkeys(label for panel in panels for label in panel.lines.values()))
    style = {label: (COLOURS[at % len(COLOURS)], SHAPES[at % len(SHAPES)]) for at, label in enumerate(labels)}

    def paint(figure: Figure) -> None:
        for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            x = [row[over] for row in rows]
            for column, label in panel.lines.items():
                y, (colour, shape) = [row[column] for row in rows], style[label]
                axes.plot(x, y, color=colour, marker=shape, markersize=4, label=label)
                if panel.spread:
                    bounds = ([row[f"{column}, {end}"] for row in rows] for end in ("least", "most"))
                    axes.fill_between(x, *bounds, color=colour, alpha=0.15, linewidth=0)
            axes.set_xscale("log", base=2 if over == "hidden" else 10)
            axes.set_yscale("linear" if panel.linear else "log")
            axes.set_xticks(x, [f"{value:g}" for value in x])
            axes.minorticks_off()
            axes.set_title(panel.title, fontsize=9)
            axes.set_xlabel(over, fontsize=8)
            axes.set_ylabel(panel.y, fontsize=8)
            axes.tick_params(labelsize=8)
            axes.grid(color=LIGHT)
            axes.legend(fontsize=7, frameon=False)

    return draw((PANEL[0] * len(panels), PANEL[1]), paint).render()["png"]


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---:|" * len(rows[0])]
    lines += ["| " + " | ".join(map(_short, row.values())) + " |" for row in rows]
    return "\n".join(lines)
