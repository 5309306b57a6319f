"""How messages quote what the user wrote: values, paths and lists, at a readable length."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from typing import Any

MAX_SHOWN = 60
"""Most characters of a value that a message quotes."""
MAX_PATH = 300
"""Most characters of a path. Paths should be quoted in full; longer ones are accidents."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean X?` with the most similar known word, or nothing."""
    similar = difflib.get_close_matches(word[:MAX_SHOWN], list(known), n=1)
    return f"; did you mean {similar[0]}?" if similar else ""


def show(value: Any) -> str:
    """A value as messages quote it: JSON, cut if it is long."""
    return shorten(json.dumps(value, ensure_ascii=not is_text(value), default=str))


def is_text(value: Any) -> bool:
    """Whether a value can be encoded in UTF-8. Undecodable bytes of a command line arrive as lone surrogates."""
    try:
        str(value).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def shorten(text: str, most: int = MAX_SHOWN) -> str:
    """The text, cut if it is longer than `most` characters."""
    return text if len(text) <= most else f"{text[:most]}..."


def percent(share: float) -> str:
    """A fraction between 0 and 1 as a percentage with two significant digits: `0.56 %`, `100 %`."""
    return f"{float(f'{100 * share:.2g}'):g} %"


def printable(text: str) -> str:
    """The text with NULs and lone surrogates escaped, so that any terminal or file accepts it."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8").replace("\0", "\\0")


def show_path(path: object) -> str:
    """A path as messages quote it."""
    return shorten(printable(str(path)), MAX_PATH)


def listed(items: Iterable[object], most: int | None = None, last: str = "", separator: str = ", ") -> str:
    """Items in one line: `a, b, c`.

    Args:
        items: What to list; each item is converted to a string.
        most: Name at most N items and count the rest: `a, b and 7 more`.
        last: Word before the last item: `a, b or c`.
        separator: Put between items. Use `; ` for phrases that contain commas; `and 7 more` is then set off too.
    """
    words = [str(item) for item in items]
    if most is not None and len(words) > most:
        joint = " and" if separator == ", " else f"{separator}and"
        return f"{separator.join(words[:most])}{joint} {len(words) - most} more"
    if last and len(words) > 1:
        return f"{separator.join(words[:-1])} {last} {words[-1]}"
    return separator.join(words)
