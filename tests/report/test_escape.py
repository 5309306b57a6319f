"""User text survives a table unchanged, as read by a Markdown parser and by a small LaTeX reader."""

from __future__ import annotations

import re
import unicodedata

from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from cl_dist.report.escape import LATEX, escape_latex, markdown_code, markdown_line, markdown_text, one_line
from cl_dist.report.tables import markdown

PARSER = MarkdownIt("commonmark").enable(["table", "strikethrough"])
NASTY = st.text(st.sampled_from("|_*`\\<>&[]()#$%~^{}!\"'-+.1ab \n\r\t\0\x1b\u202e\u00e9\u4e2d"), max_size=12)
ANY = st.text(max_size=12)
TEXT = st.one_of(NASTY, ANY)


def squeezed(text: str) -> str:
    """What a reader sees of white space: ends trimmed; a cell cannot begin or end with it."""
    return text.strip(" ")


def shown(markup: str) -> list[list[str]]:
    """The text of a table's cells, as a Markdown parser shows it; raises if anything in them is markup."""
    rows: list[list[str]] = []
    for token in PARSER.parse(markup):
        if token.type == "tr_open":
            rows.append([])
        elif token.type == "inline":
            children = token.children or []
            assert {child.type for child in children} <= {"text", "text_special", "code_inline"}, children
            rows[-1].append("".join(child.content for child in children))
    return rows


@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3))
def test_markdown_cells(cells: list[tuple[str, str]]) -> None:
    table = markdown(["a|b", "_c_"], cells)
    assert table.count("\n") == len(cells) + 1
    assert shown(table) == [["a|b", "_c_"], *([squeezed(one_line(cell)) for cell in row] for row in cells)]


@given(TEXT.filter(lambda text: one_line(text).strip(" ") != ""))
def test_code_in_a_cell(text: str) -> None:
    (_, (cell, end)) = shown(markdown(["a", "b"], [[markdown_code(text), "end"]]))
    assert squeezed(cell) == squeezed(one_line(text))
    assert end == "end"


@example("---")
@example(" - - -")
@example("    - a")
@given(TEXT.filter(lambda text: squeezed(one_line(text)) != ""))
def test_a_line_of_its_own(text: str) -> None:
    tokens = PARSER.parse(markdown_line(text))
    assert [token.type for token in tokens] == ["paragraph_open", "inline", "paragraph_close"]
    children = tokens[1].children or []
    assert "".join(child.content for child in children) == squeezed(one_line(text))


def test_ordinary_names_stay_readable() -> None:
    assert markdown_text("task_a-1.b") == "task_a-1.b"
    assert markdown_text("_a_") == r"\_a\_"
    assert markdown_text("a|b & <c>") == r"a\|b &amp; &lt;c&gt;"


def read_latex(text: str) -> str:
    """Undo the escapes; raises if a character remains that LaTeX would interpret."""
    commands = sorted(LATEX.items(), key=lambda item: -len(item[1]))
    found = []
    while text:
        for character, written in commands:
            if text.startswith(written):
                found.append(character)
                text = text[len(written) :]
                break
        else:
            assert text[0] not in LATEX, text
            found.append(text[0])
            text = text[1:]
    return "".join(found)


@given(TEXT)
def test_latex_cells(text: str) -> None:
    assert read_latex(escape_latex(text)) == one_line(text)
    assert "\n" not in escape_latex(text)
    assert not re.match(r"\s*[\[*]", escape_latex(text)), "an option of the line break before it"


@given(ANY)
def test_no_control_characters_are_left(text: str) -> None:
    assert not [
        character
        for character in one_line(text + "\x1b[31m\0\r\n\u202e")
        if unicodedata.category(character) in ("Cc", "Cs")
    ]
