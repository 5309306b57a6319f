"""Text of users in tables: every character is shown as it is and none of them is taken for markup.

CSV needs none of this: the csv module quotes what needs it.
"""

from __future__ import annotations

import re
import unicodedata

MARKUP = {character: f"\\{character}" for character in "\\`*|[]~$"} | {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
"""What Markdown takes for markup inside a line, and how it is written instead. `_` is one only beside a space or a
mark (GitHub's flavour), and stays as it is inside a name.
"""
LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    # `\\ [` and `\\ *` begin an option of the line break that is before them.
    "[": "{[}",
    "]": "{]}",
    "*": "{*}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}
_LONE_UNDERSCORE = re.compile(r"(?<![^\W_])_|_(?![^\W_])")
_LEADING = re.compile(r"^(#{1,6}(?= |$)|[-+](?= |$)|\d+(?=[.)]))")


class Markdown(str):
    """Text that is Markdown already: a table's cell leaves it alone."""

    __slots__ = ()


def one_line(text: str) -> str:
    """`text` on one line: white space becomes a space each, and what cannot be shown the sign for that (U+FFFD)."""
    shown = ("\ufffd" if _is_hidden(character) else character for character in re.sub(r"\s", " ", text))
    return "".join(shown)


def _is_hidden(character: str) -> bool:
    """Control characters, half of a surrogate pair, and what turns the direction of the text around it."""
    return unicodedata.category(character) in ("Cc", "Cs") or character in "\u202a\u202b\u202d\u202e\u2066\u2067\u2068"


def markdown_text(text: str) -> str:
    """`text` as Markdown shows it, on one line."""
    escaped = "".join(MARKUP.get(character, character) for character in one_line(text))
    return _LONE_UNDERSCORE.sub(r"\\_", escaped)


def markdown_line(text: str) -> str:
    """As `markdown_text`, for text that begins a line: it becomes no heading and no list."""
    escaped = markdown_text(text)
    return _LEADING.sub(lambda mark: mark[0] + "\\" if mark[0].isdecimal() else "\\" + mark[0], escaped)


def markdown_code(text: str) -> Markdown:
    """`text` as a code span that may stand in a table's cell."""
    shown = one_line(text).replace("|", "\\|")
    longest = max((len(run) for run in re.findall("`+", shown)), default=0)
    fence = "`" * (longest + 1)
    pad = " " if shown[:1] in ("`", " ") or shown[-1:] in ("`", " ") else ""
    return Markdown(f"{fence}{pad}{shown}{pad}{fence}")


def escape_latex(text: str) -> str:
    """`text` as LaTeX prints it, on one line."""
    return "".join(LATEX.get(character, character) for character in one_line(text))
