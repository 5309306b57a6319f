"""Draw the figures of README and docs: accuracy matrices from committed numbers, and pictures of the concepts.

    python tools/draw_figures.py        # writes docs/images/*-light.svg and *-dark.svg

Every figure comes in two versions, for light and for dark pages. The same numbers give the same bytes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs/images"
FIRST_RUN = ROOT / "docs/results/first-run.md"
"""Where the measured accuracy matrices stand."""


@dataclass(frozen=True)
class Theme:
    """Colours of one version of the figures, all as `#rrggbb`."""

    name: str
    text: str
    faint: str
    line: str
    low: str
    """Colour of a score of 0."""
    high: str
    """Colour of a score of 1."""
    old: str
    new: str
    accent: str


THEMES = (
    Theme("light", "#1f2328", "#59636e", "#9aa4af", "#edf3fb", "#0b57b5", "#b9a6dd", "#f2b36b", "#b3261e"),
    Theme("dark", "#e6edf3", "#9ea7b3", "#5b6672", "#1b2735", "#6cb2ff", "#6d55a8", "#a8641a", "#ff8f86"),
)


def mixed(low: str, high: str, share: float) -> str:
    """The colour at `share` (0 to 1) of the way from `low` to `high`."""
    pairs = [(int(low[at : at + 2], 16), int(high[at : at + 2], 16)) for at in (1, 3, 5)]
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in pairs)


def luminance(colour: str) -> float:
    """Relative luminance of a colour, from 0 to 1 (WCAG 2.2)."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def readable_on(background: str) -> str:
    """Black or white, whichever has more contrast on `background`."""
    light = luminance(background)
    return "#000000" if (light + 0.05) / 0.05 >= 1.05 / (light + 0.05) else "#ffffff"


@dataclass
class Drawing:
    """An SVG in the making; coordinates are pixels from the top left."""

    theme: Theme
    width: int
    height: int
    title: str
    """What the figure shows, for those who cannot see it."""
    parts: list[str] = field(default_factory=list)

    def box(self, x: float, y: float, width: float, height: float, fill: str, edge: str | None = None) -> None:
        """Add a rectangle."""
        stroke = f' stroke="{edge}" stroke-width="1.5"' if edge else ""
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="3" fill="{fill}"{stroke}/>'
        )

    def text(
        self,
        x: float,
        y: float,
        words: str,
        *,
        size: int = 17,
        colour: str | None = None,
        anchor: str = "middle",
        bold: bool = False,
    ) -> None:
        """Add one line of text with its baseline at `y`; `anchor` is start, middle or end."""
        weight = ' font-weight="600"' if bold else ""
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}"{weight} '
            f'fill="{colour or self.theme.text}">{escape(words)}</text>'
        )

    def line(self, points: Sequence[tuple[float, float]], colour: str, width: float = 2, dashed: bool = False) -> None:
        """Add a line through `points`."""
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        dash = ' stroke-dasharray="6 5"' if dashed else ""
        self.parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width:g}"{dash}/>')

    def arrow(self, x: float, y: float, x2: float, y2: float) -> None:
        """Add an arrow, horizontal or vertical."""
        colour = self.theme.line
        self.line([(x, y), (x2, y2)], colour)
        dx, dy = (x2 > x) - (x2 < x), (y2 > y) - (y2 < y)
        tips = [(x2 - 9 * dx - 5 * dy, y2 - 9 * dy - 5 * dx), (x2 - 9 * dx + 5 * dy, y2 - 9 * dy + 5 * dx)]
        points = " ".join(f"{x:g},{y:g}" for x, y in [(x2, y2), *tips])
        self.parts.append(f'<polygon points="{points}" fill="{colour}"/>')

    def svg(self) -> str:
        """The file's text."""
        body = "\n".join(self.parts)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" role="img" '
            f'width="{self.width}" height="{self.height}" '
            f'font-family="system-ui, -apple-system, Segoe UI, Roboto, Helvetica, Arial, sans-serif">\n'
            f"<title>{escape(self.title)}</title>\n{body}\n</svg>\n"
        )


# The measured numbers


@dataclass(frozen=True)
class Measured:
    """One method's accuracy matrix."""

    tasks: list[str]
    rows: list[list[float]]
    """`rows[0]` has the scores before training, `rows[i]` those after task i (from 1)."""
    forgetting: float


def measured(method: str) -> Measured:
    """Read a method's matrix and forgetting from the page of the first real run."""
    page = FIRST_RUN.read_text(encoding="utf-8")
    section = page.partition(f"### {method}")[2].partition("\n### ")[0]
    header, _, *lines = [line for line in section.splitlines() if line.startswith("|")]
    columns = _cells(page.partition("### Side by side")[2].partition("| --")[0].partition("|---")[0])
    forgetting = _cells(re.findall(r"^\| forgetting .*$", page, flags=re.MULTILINE)[0])
    return Measured(
        tasks=_cells(header)[1:],
        rows=[[float(cell) for cell in _cells(line)[1:]] for line in lines],
        forgetting=float(forgetting[columns.index(method)]),
    )


def _cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip().strip("|").split("|")]


# Figures


def matrices(theme: Theme) -> Drawing:
    """Sequential fine-tuning and MIGU side by side, after each task."""
    drawing = Drawing(
        theme,
        864,
        356,
        "Accuracy on four tasks after training on each. Sequential fine-tuning ends with dbpedia 0.52, amazon 0.22, "
        "yahoo 0.10, agnews 0.78; MIGU with dbpedia 0.74, amazon 0.32, yahoo 0.14, agnews 0.74.",
    )
    for left, method, name in ((0, "sequential", "Fine-tuning"), (444, "migu", "MIGU")):
        matrix = measured(method)
        drawing.text(left + 104, 26, name, size=22, anchor="start", bold=True)
        drawing.text(left + 420, 26, f"forgets {matrix.forgetting:.2f}", size=20, colour=theme.accent, anchor="end")
        for column, task in enumerate(matrix.tasks):
            drawing.text(left + 143 + 79 * column, 66, task, colour=theme.faint)
        for row, scores in enumerate(matrix.rows):
            _matrix_row(drawing, left, 78 + 46 * row, row, scores, matrix.tasks)
    drawing.text(
        432,
        340,
        "Row: after training on this task. Column: accuracy on that task. Coloured: learnt already.",
        size=17,
        colour=theme.faint,
    )
    return drawing


def _matrix_row(drawing: Drawing, left: float, top: float, row: int, scores: list[float], tasks: list[str]) -> None:
    theme = drawing.theme
    label = f"+ {tasks[row - 1]}" if row else "untrained"
    drawing.text(left + 94, top + 28, label, colour=theme.faint, anchor="end")
    for column, score in enumerate(scores):
        x = left + 105 + 79 * column
        if column < row:
            fill = mixed(theme.low, theme.high, score)
            drawing.box(x, top, 76, 42, fill, theme.text if column == row - 1 else None)
            drawing.text(x + 38, top + 28, f"{score:.2f}", size=20, colour=readable_on(fill))
        else:
            drawing.text(x + 38, top + 28, f"{score:.2f}", size=17, colour=theme.faint)


def forgetting(theme: Theme) -> Drawing:
    """The first task's score over the stream, and how forgetting is read off it."""
    methods = {"fine-tuning": measured("sequential"), "MIGU": measured("migu")}
    drawing = Drawing(
        theme, 720, 320, "Accuracy on dbpedia falls from 0.84 to 0.52 with fine-tuning, and to 0.74 with MIGU."
    )
    x = [90.0, 250.0, 410.0, 570.0]

    def y(score: float) -> float:
        return 250 - 220 * score

    for score in (0.0, 0.5, 1.0):
        drawing.line([(70, y(score)), (590, y(score))], theme.line, 1, dashed=score > 0)
        drawing.text(60, y(score) + 6, f"{score:g}", colour=theme.faint, anchor="end")
    for place, task in zip(x, methods["MIGU"].tasks, strict=True):
        drawing.text(place, 276, task, colour=theme.faint)
    for (name, matrix), colour in zip(methods.items(), (theme.accent, theme.high), strict=True):
        scores = [row[0] for row in matrix.rows[1:]]
        drawing.line([(place, y(score)) for place, score in zip(x, scores, strict=True)], colour, 3)
        for place, score in zip(x, scores, strict=True):
            drawing.parts.append(f'<circle cx="{place:g}" cy="{y(score):g}" r="5" fill="{colour}"/>')
        drawing.text(x[-1] + 16, y(scores[-1]) + 6, f"{name} {scores[-1]:.2f}", colour=colour, anchor="start")
    drawing.text(330, 308, "accuracy on dbpedia, after training on …", colour=theme.faint)
    return drawing


MAGNITUDES = (0.35, 0.9, 0.2, 0.55, 0.15, 0.75, 0.3, 0.25, 0.1, 0.45)
"""Made-up output magnitudes of a layer with ten rows; with a threshold of 0.7, MIGU keeps the largest three."""


def migu(theme: Theme) -> Drawing:
    """From a layer's outputs to the rows of its gradient that are applied."""
    drawing = Drawing(
        theme,
        720,
        350,
        "MIGU ranks the rows of a layer by the magnitude of their outputs and applies the gradient of the top rows.",
    )
    kept = sorted(MAGNITUDES)[-3:]
    for x, words in ((125, "output magnitude"), (345, "keep the top rows"), (585, "gradient that is applied")):
        drawing.text(x, 26, words, bold=True)
    for row, magnitude in enumerate(MAGNITUDES):
        y, keep = 44 + 27 * row, magnitude in kept
        drawing.text(24, y + 16, str(row + 1), size=15, colour=theme.faint)
        drawing.box(42, y, 180 * magnitude, 22, theme.high if keep else theme.line)
        drawing.text(345, y + 17, "kept" if keep else "dropped", colour=theme.text if keep else theme.faint)
        for column in range(8):
            fill = theme.high if keep else theme.low
            drawing.box(480 + 27 * column, y, 24, 22, fill)
    drawing.arrow(250, 176, 290, 176)
    drawing.arrow(405, 176, 460, 176)
    drawing.text(360, 340, "one linear layer with ten rows, threshold 0.7; numbers made up", colour=theme.faint)
    return drawing


UNITS = (("unit 1", 0.9, 0.1), ("unit 2", 0.1, 0.9), ("unit 3", 0.8, 0.8), ("unit 4", 0.1, 0.1))
"""Made-up importances of four units, to the new task and to the past."""
SHARES = (1.0, 0.0, 0.3, 0.5)
"""Shares of the new weights that hard fusion gives these units with the default settings."""


def kif(theme: Theme) -> Drawing:
    """Four units, how important they are to the new task and to the past, and what fusion makes of them."""
    drawing = Drawing(
        theme,
        720,
        310,
        "KIF mixes the weights before and after a task unit by unit: new ones where only the new task needs the unit, "
        "old weights where only the past does, a mixture otherwise.",
    )
    for x, words in ((190, "matters now"), (390, "mattered before"), (600, "weights after fusion")):
        drawing.text(x, 26, words, bold=True)
    for row, ((unit, now, past), share) in enumerate(zip(UNITS, SHARES, strict=True)):
        y = 50 + 56 * row
        drawing.text(56, y + 26, unit, colour=theme.faint)
        drawing.box(110, y + 6, 160 * now, 28, theme.new)
        drawing.box(310, y + 6, 160 * past, 28, theme.old)
        drawing.box(510, y + 2, 180 * share, 36, theme.new)
        drawing.box(510 + 180 * share, y + 2, 180 * (1 - share), 36, theme.old)
        words = f"{share:.0%} new" if 0 < share < 1 else ("new" if share else "old")
        drawing.text(600, y + 26, words, colour=theme.text)
    drawing.text(360, 298, "hard fusion with the default shares; importances made up", colour=theme.faint)
    return drawing


def sharding(theme: Theme) -> Drawing:
    """A matrix, flattened and cut into one piece per rank, in the middle of a row."""
    drawing = Drawing(
        theme,
        720,
        300,
        "ZeRO flattens a matrix of five rows and gives each of two ranks half of it; the third row is on both ranks.",
    )
    fills = [mixed(theme.low, theme.high, share) for share in (0.15, 0.35, 0.55, 0.75, 0.95)]
    drawing.text(90, 26, "a matrix", bold=True)
    for row, fill in enumerate(fills):
        for column in range(4):
            drawing.box(30 + 31 * column, 42 + 31 * row, 28, 28, fill)
        drawing.text(176, 62 + 31 * row, f"row {row + 1}", size=15, colour=theme.faint)
    drawing.arrow(216, 118, 252, 118)
    for rank, top in enumerate((60, 140)):
        drawing.text(264, top + 20, f"rank {rank}", anchor="start")
        for place in range(10):
            element = 10 * rank + place
            drawing.box(330 + 37 * place, top, 34, 30, fills[element // 4], theme.accent if element // 4 == 2 else None)
    drawing.text(515, 122, "row 3 lies on both ranks", size=15, colour=theme.accent)
    drawing.text(360, 240, "Each rank holds, updates and saves only its own elements.", colour=theme.text)
    drawing.text(360, 268, "Methods see flat pieces; cl_dist works out which rows they belong to.", colour=theme.faint)
    return drawing


FIGURES: dict[str, Callable[[Theme], Drawing]] = {
    "matrices": matrices,
    "forgetting": forgetting,
    "migu": migu,
    "kif": kif,
    "sharding": sharding,
}


def drawn() -> dict[str, str]:
    """The text of every file in docs/images that this script makes, by name."""
    return {f"{name}-{theme.name}.svg": draw(theme).svg() for name, draw in FIGURES.items() for theme in THEMES}


def main() -> None:
    """Write the figures."""
    IMAGES.mkdir(exist_ok=True)
    for name, text in drawn().items():
        (IMAGES / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
