"""The page as text; test_browser looks at it in a browser."""

from __future__ import annotations

import re

from cl_dist.report import pictures
from cl_dist.report.blocks import Cell, Code, Details, Fact, Facts, Figure, Page, Section, Table, Text
from cl_dist.report.drawing import BLUE, INK
from cl_dist.report.html import THEMED, embed, render

EVIL = "<script>alert('1')</script>\u202e\x07"
SHOWN = "&lt;script&gt;alert(&#39;1&#39;)&lt;/script&gt;\ufffd\ufffd"


def svg() -> bytes:
    return pictures.accuracy_matrix(["a", "b"], [[0.0, 0.5], [1.0, 0.5], [0.5, 1.0]]).render(["svg"])["svg"]


def test_every_text_is_escaped() -> None:
    table = Table(EVIL, [EVIL, EVIL], [[EVIL, Cell(EVIL, tone="good")], [EVIL, Cell(EVIL, span=(0.25, 0.5))]])
    blocks = [Text(EVIL, [EVIL]), Facts([Fact(EVIL, EVIL, EVIL)]), table, Details(EVIL, [Code(EVIL, EVIL)])]
    blocks.append(Figure("matrix", EVIL, EVIL))
    html = render(
        Page(EVIL, EVIL, [Section("first", EVIL, blocks), Section("a", EVIL, [])], {EVIL: EVIL}), {"matrix": svg()}
    )
    assert "<script" not in html
    assert "\u202e" not in html
    # Title, heading, subtitle; contents, two sections; text 2, facts 3, table 9, details 3, figure 2, link 2.
    assert html.count(SHOWN) == 6 + 2 + 3 + 9 + 3 + 2 + 2
    assert "left:25.0%;right:50.0%" in html


def test_a_figure_without_a_picture_is_left_out() -> None:
    page = Page("a", "b", [Section("first", "c", [Figure("matrix", "caption", "alt")])])
    assert "caption" not in render(page, {}).partition("</style>")[2]


def test_a_picture_follows_the_theme_and_keeps_to_itself() -> None:
    text = embed("matrix", svg())
    assert text.startswith("<svg ")
    assert "var(--ink)" in text
    assert not re.search("|".join(THEMED), text)
    assert {BLUE, INK} <= THEMED.keys()
    for gone in ("<style", "<metadata", "<?xml", "<!DOCTYPE"):
        assert gone not in text
    names = re.findall(r'\bid="([^"]*)"', text)
    assert names
    assert all(name.startswith("matrix-") for name in names)
    # Everything that the picture refers to is in it, under its new name.
    assert set(re.findall(r'(?:href="#|url\(#)([^")]*)', text)) <= set(names)
    addresses = re.findall(r'(?:href|src)="([^"]*)"', text)
    assert all(address.startswith(("#", "data:")) for address in addresses)


def test_other_formats_are_offered_until_they_are_there() -> None:
    section, hint = Section("first", "c", []), "<code>--figures svg,pdf</code>"
    for files, offered in ((["a.csv"], False), (["a.csv", "b.png"], True), (["b.png", "b.pdf"], False)):
        assert (hint in render(Page("a", "b", [section], {name: name for name in files}), {})) is offered


def test_lines_are_drawn_on_the_page_itself() -> None:
    """In the dark theme, white axes under light lines would hide them."""
    drawn = pictures.scores(["a"], [[0.0], [1.0]]).render(["svg"])["svg"]
    assert "var(--paper)" in embed("scores", drawn)
    assert "#ffffff" not in embed("scores", drawn)


def test_long_names_may_be_broken_where_their_words_end() -> None:
    table = Table("caption", ["a_b", "c"], [["method.0.importance_from<b>", "x_y"]])
    html = render(Page("a", "b", [Section("first", "c", [table])]), {})
    assert ">method.<wbr>0.<wbr>importance_<wbr>from&lt;b&gt;</th>" in html
    assert ">a_<wbr>b</span>" in html
