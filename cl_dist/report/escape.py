"""Escapes user text in Markdown and LaTeX, so that every character is shown literally and none acts as markup.

CSV needs no escaping: the csv module quotes where necessary.
"""

from __future__ import annotations

import re
import unicodedata

MARKUP = {character: f"\\{character}" for character in "\\`*|[]~$"} | {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
"""Characters that are markup within a line of Markdown, and their escapes. `_` is markup only next to a space or a
punctuation mark (GitHub's flavour), and stays unescaped inside a name.
"""
LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    # After a line break (`\\`), `[` and `*` would start an option of that break.
    "[": "{[}",
    "]": "{]}",
    "*": "{*}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}
_LONE_UNDERSCORE = re.compile(r"(?<![^\W_])_|_(?![^\W_])")
_LEADING = re.compile(r"^(#{1,6}(?= |$)|[-+](?= |$)|-(?=[- ]*$)|\d+(?=[.)]))")


class Markdown(str):
    """Text that is already Markdown: table cells do not escape it."""

    __slots__ = ()


def one_line(text: str) -> str:
    """`text` on one line: each white-space character becomes a space, each invisible one U+FFFD."""
    shown = ("\ufffd" if _is_hidden(character) else character for character in re.sub(r"\s", " ", text))
    return "".join(shown)


def _is_hidden(character: str) -> bool:
    """Whether a character is a control character, half of a surrogate pair, or changes the direction of text."""
    return unicodedata.category(character) in ("Cc", "Cs") or character in "\u202a\u202b\u202d\u202e\u2066\u2067\u2068"


def markdown_text(text: str) -> str:
    """`text` as Markdown, on one line."""
    escaped = "".join(MARKUP.get(character, character) for character in one_line(text))
    return _LONE_UNDERSCORE.sub(r"\\_", escaped)


def markdown_line(text: str) -> str:
    """`markdown_text` for the beginning of a line, where text must not become a heading, a list, a rule or code."""
    escaped = markdown_text(text).lstrip(" ")
    return _LEADING.sub(lambda mark: mark[0] + "\\" if mark[0].isdecimal() else "\\" + mark[0], escaped)


def markdown_code(text: str) -> Markdown:
    """`text` as a code span, which also works in a table cell."""
    shown = one_line(text).replace("|", "\\|")
    longest = max((len(run) for run in re.findall("`+", shown)), default=0)
    fence = "`" * (longest + 1)
    pad = " " if shown[:1] in ("`", " ") or shown[-1:] in ("`", " ") else ""
    return Markdown(f"{fence}{pad}{shown}{pad}{fence}")


def escape_latex(text: str) -> str:
    """`text` as LaTeX, on one line."""
    return "".join(LATEX.get(character, character) for character in one_line(text))
