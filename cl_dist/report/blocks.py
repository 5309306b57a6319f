"""What a page of HTML consists of: sections of text, facts, tables and figures, as plain data without markup.

The template (`templates/page.html`) decides how they look, and escapes everything.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar


@dataclass(frozen=True)
class Cell:
    """A cell of a table that is more than text."""

    text: str
    heat: float | None = None
    """Colour from 0 (none) to 1 (full); None: no colour."""
    own: bool = False
    """Frame it: the task that was just trained."""
    tone: str = ""
    """`good`, `bad` or `` (neither)."""
    span: tuple[float, float] | None = None
    """Draw a line from the first to the second place, both from 0 to 1, in place of the text, which stays readable for
    a screen reader."""


@dataclass(frozen=True)
class Text:
    """A paragraph, or a list of short sentences."""

    text: str = ""
    items: Sequence[str] = ()
    kind: ClassVar[str] = "text"


@dataclass(frozen=True)
class Fact:
    """One number or word with its name, and what exactly it is."""

    name: str
    value: str
    note: str = ""
    tone: str = ""
    """As in `Cell`."""


@dataclass(frozen=True)
class Facts:
    """Some facts side by side; the first one is the largest, unless they are all of one kind."""

    facts: Sequence[Fact]
    equal: bool = False
    """Whether they are of one kind: the same number of several runs."""
    kind: ClassVar[str] = "facts"


@dataclass(frozen=True)
class Table:
    """A table; the first cell of each row is the row's heading."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]
    words: Collection[int] = ()
    """Columns of text, which are aligned on the left; the others are numbers."""
    upright: bool = False
    """Whether the headings of columns are turned, because there are many with long names."""
    kind: ClassVar[str] = "table"


@dataclass(frozen=True)
class Figure:
    """A picture by its name, with what it shows in words."""

    name: str
    caption: str
    alt: str
    """What a reader who cannot see the picture needs, in a sentence or two; the numbers are in a table or a file."""
    kind: ClassVar[str] = "figure"


@dataclass(frozen=True)
class Details:
    """Blocks that open on demand."""

    summary: str
    blocks: Sequence[Block]
    kind: ClassVar[str] = "details"


@dataclass(frozen=True)
class Code:
    """A text with fixed line breaks, such as a file."""

    name: str
    text: str
    kind: ClassVar[str] = "code"


Block = Text | Facts | Table | Figure | Details | Code


@dataclass(frozen=True)
class Section:
    """A section of the page."""

    anchor: str
    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Page:
    """A page."""

    title: str
    subtitle: str
    sections: Sequence[Section]
    """The first one is the summary, whose title is not shown."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Links to files beside the page: name -> address."""


def number(value: float | None, digits: int = 4) -> str:
    """A score with a true minus sign; a dash if it is missing or not a number."""
    if value is None or math.isnan(value):
        return "–"
    text = f"{value:.{digits}f}"
    return text.removeprefix("-") if float(text) == 0 else text.replace("-", "−")


def change(value: float | None, digits: int = 4, *, more_is_better: bool = True) -> Cell:
    """A difference with its sign, and whether it is good."""
    shown = number(value, digits)
    if value is None or math.isnan(value) or float(f"{value:.{digits}f}") == 0:
        return Cell(shown)
    return Cell(f"+{shown}" if value > 0 else shown, tone="good" if (value > 0) == more_is_better else "bad")
