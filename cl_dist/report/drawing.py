"""Drawing primitives: sizes, colours, heat maps, and the bytes of PNG, SVG and PDF files.

matplotlib is imported only for drawing, without pyplot: no state is kept between pictures, no display is needed, and no
other command pays for the import. A picture depends on its data only: it uses matplotlib's own defaults and font, and
the file contains no date or version. All colours can be distinguished with any kind of colour vision.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cl_dist.report import FORMATS
from cl_dist.report.columns import Columns
from cl_dist.report.units import Floats

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

DPI = 110
_UNWANTED = {"png": ("Software",), "svg": ("Date", "Creator"), "pdf": ("CreationDate", "Creator", "Producer")}
"""Metadata that would make the bytes depend on more than the data."""
INK = "#1d1d1f"
"""Text and axes."""
PAPER = "#fefefe"
"""Background of the axes. Not plain white, which is also the colour of numbers in dark cells: on a page, it follows the
theme, and those do not."""
_STYLE: dict[str, Any] = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    "axes.facecolor": PAPER,
    "svg.fonttype": "none",  # text stays text: readable by machines, and in fonts that know its script
    "svg.hashsalt": "cl_dist",
    "pdf.fonttype": 42,  # TrueType, which journals ask for
}
BLUE, ORANGE = "#0072b2", "#d55e00"
"""From Okabe and Ito's palette."""
GREY, PALE, LIGHT = "#767676", "#c4c4c4", "#e6e6e6"
"""Background elements."""
SEQUENTIAL, DIVERGING = "viridis", "PuOr_r"
"""Maps without a grey in the middle of the first one: grey means that there is no value."""
NO_VALUE = {SEQUENTIAL: "#e6e6e6", DIVERGING: "#9e9e9e"}
"""Colours of missing values; they do not occur in the maps."""
BORDER = {SEQUENTIAL: PAPER, DIVERGING: GREY}
"""Lines between blocks and between rows of heat maps without numbers."""
LABEL = 30
"""Longest label in characters; longer ones are shortened in the middle."""
LETTER = 0.075
"""Inches: width of a letter at 8 points."""
CELL, ROW = 0.6, 0.3
"""Inches: width of a cell with a number in it; height of a row."""
WIDE, TALL = 12.0, 10.0
"""Inches: width of a picture of the whole stream or the whole model; largest height of all rows together."""
LINE = 0.15
"""Inches between two labels at 8 points; if tasks are closer, only some labels are shown."""
LEAST_FRAMED = 0.06
"""Inches: smaller cells are not framed."""
NUMBERED = 20
"""With more rows or columns than this, the cells of a heat map have no room for numbers."""


@dataclass(frozen=True)
class Picture:
    """A figure that can be rendered in several formats."""

    size: tuple[float, float]
    """Width and height in inches."""
    paint: Callable[[Figure], None]

    def render(self, formats: Collection[str] = ("png",)) -> dict[str, bytes]:
        """The files by format (`FORMATS`); the same data gives the same bytes, whichever formats are asked for."""
        from matplotlib.figure import Figure

        with _styled():
            figure = self._painted(Figure)
            # The layout takes as long as the drawing, so it is computed once, for the first of the formats.
            figure.draw_without_rendering()
            figure.set_layout_engine("none")
            return {name: _save(figure, name) for name in FORMATS if name in formats}

    def figure(self) -> Figure:
        """A matplotlib figure of its own, to change or save. A notebook shows it, also where pyplot is not set up."""
        from matplotlib.figure import Figure

        class Shown(Figure):
            def _repr_png_(self) -> bytes:
                with _styled():
                    return _save(self, "png")

        with _styled():
            return self._painted(Shown)

    def _painted(self, kind: type[Figure]) -> Figure:
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        figure = kind(figsize=self.size, layout="constrained")
        FigureCanvasAgg(figure)
        self.paint(figure)
        return figure


@contextmanager
def _styled() -> Iterator[None]:
    """Draw with our own settings, whatever those of the process are."""
    import matplotlib.style

    with matplotlib.style.context(["default", _STYLE]), warnings.catch_warnings():
        # A name in a script that the font lacks (emoji, say) gets boxes in PNG and PDF; SVG keeps the text.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def draw(size: tuple[float, float], paint: Callable[[Figure], None]) -> Picture:
    """A figure of `size` inches, drawn by `paint`."""
    return Picture(size, paint)


def _save(figure: Figure, name: str) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format=name, dpi=DPI, metadata=dict.fromkeys(_UNWANTED[name]))
    return file.getvalue()


def short(text: str) -> str:
    """Shorten a text to fit beside an axis."""
    half = (LABEL - 1) // 2
    shown = text if len(text) <= LABEL else f"{text[:half]}…{text[-half:]}"
    return shown.replace("$", r"\$")  # not the start of a formula


def cell_size(rows: int, columns: int) -> tuple[float, float]:
    """Width and height in inches of the cells of a numbered heat map; smaller if there are too many for numbers."""
    if max(rows - 1, columns) <= NUMBERED:
        return CELL, ROW
    return min(CELL, WIDE / columns), min(ROW, TALL / rows)


def row_height(rows: int) -> float:
    """Height in inches of the rows of a block heat map."""
    return min(ROW, TALL / max(1, rows))


def fit(labels: Sequence[str], room: float) -> bool:
    """Whether labels at 8 points fit side by side with `room` inches each."""
    return max((len(short(label)) for label in labels), default=0) * LETTER <= room


def numbered_heat_map(
    axes: Axes,
    values: Floats,
    rows: Sequence[str],
    columns: Sequence[str],
    colours: tuple[str, Normalize],
    shades: Floats | None = None,
) -> ScalarMappable:
    """Draw a heat map with a number in every cell, or a dash for NaN; without numbers if there is no room for them.

    Args:
        axes: Where to draw.
        values: `(rows, columns)`.
        rows: Labels from top to bottom.
        columns: Labels from left to right.
        colours: Name of the colour map, and its scale.
        shades: What the colours show, if they are not those of the values themselves; the shape of `values`.
    """
    shades = values if shades is None else shades
    image = _heat_map(axes, shades, colours)
    width, height = cell_size(*values.shape)
    if (width, height) == (CELL, ROW):
        _number(axes, image, values, shades)
    _label_rows(axes, rows, height)
    _label_columns(axes, range(len(columns)), columns, width)
    return image


def _number(axes: Axes, image: ScalarMappable, values: Floats, shades: Floats) -> None:
    """Write each value into its cell, in black or white, whichever has more contrast."""
    painted = np.asarray(image.to_rgba(shades))
    for (row, column), value in np.ndenumerate(values):
        # White on dark cells. The weights are those of luminance in ITU-R BT.709.
        red, green, blue = painted[row, column][:3]
        dark = not np.isnan(value) and 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.4
        text = "–" if np.isnan(value) else f"{value:.2f}".replace("-0.00", "0.00").replace("-", "−")
        colour = "white" if dark else "black"
        written = axes.text(column, row, text, ha="center", va="center", fontsize=8, color=colour)
        written.set_in_layout(False)  # inside the axes anyway, and measuring every text would take most of the time


def frame_cells(axes: Axes, cells: Sequence[tuple[int, int]], cell: tuple[float, float]) -> None:
    """Frame cells (column, row) of a heat map with cells of this size, unless the cells are too small."""
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    if not cells or min(cell) < LEAST_FRAMED:
        return
    patches = [Rectangle((column - 0.5, row - 0.5), 1, 1) for column, row in cells]
    width = min(1.8, 10 * min(cell))
    axes.add_collection(PatchCollection(patches, facecolor="none", edgecolor=ORANGE, linewidth=width))


def block_heat_map(
    axes: Axes, values: Floats, rows: Sequence[str], columns: Columns, colours: tuple[str, Normalize]
) -> ScalarMappable:
    """Draw a heat map with labelled blocks of columns; `values` is `(rows, columns)`, NaN for missing values."""
    image, border = _heat_map(axes, values, colours), BORDER[colours[0]]
    widths = np.array([width for _, width in columns.blocks])
    ends = np.cumsum(widths) - 0.5  # cells are centred on whole numbers
    for end in ends[:-1]:
        axes.axvline(end, color=border, linewidth=1.2)
    height = row_height(len(rows))
    if height == ROW:  # lines between thinner rows would hide them
        for row in range(1, len(rows)):
            axes.axhline(row - 0.5, color=border, linewidth=0.6)
    labels = [label for label, _ in columns.blocks]
    _label_rows(axes, rows, height)
    _label_columns(axes, ends - widths / 2, labels, WIDE * 0.8 * widths.min() / widths.sum())
    return image


def add_colour_bar(
    figure: Figure, image: ScalarMappable, axes: Axes, label: str, ends: tuple[str, str] | None = None
) -> None:
    """Draw the colour scale beside a heat map; `ends` are words for 0 and 1, in place of numbers."""
    bar = figure.colorbar(image, ax=axes, pad=0.01, fraction=0.05, aspect=25)
    bar.set_label(label, fontsize=8)
    if ends is not None:
        bar.set_ticks([0.0, 1.0], labels=list(ends))
    bar.ax.tick_params(labelsize=8)


def _heat_map(axes: Axes, values: Floats, colours: tuple[str, Normalize]) -> ScalarMappable:
    import matplotlib

    name, norm = colours
    cmap = matplotlib.colormaps[name].with_extremes(bad=NO_VALUE[name])
    return axes.imshow(values, cmap=cmap, norm=norm, aspect="auto", interpolation="nearest")


def thinned(count: int, room: float) -> range:
    """Which of `count` labels to show if each has `room` inches: all, or every second, third and so on."""
    return range(0, count, max(1, math.ceil(LINE / room - 1e-9)))


def _label_rows(axes: Axes, labels: Sequence[str], room: float) -> None:
    shown = thinned(len(labels), room)
    axes.set_yticks(shown, [short(labels[row]) for row in shown], fontsize=8)
    axes.tick_params(length=0)


def _label_columns(axes: Axes, places: Sequence[float] | Floats | range, labels: Sequence[str], room: float) -> None:
    """Label the columns; each label has `room` inches. Slant the labels if that is too little, and thin them out."""
    slanted: dict[str, Any] = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
    style: dict[str, Any] = {"ha": "center"} if fit(labels, room) else slanted
    shown = thinned(len(labels), room)
    axes.set_xticks([places[each] for each in shown], [short(labels[each]) for each in shown], fontsize=8, **style)
