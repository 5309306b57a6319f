"""How a message repeats what its reader has written."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from typing import Any

MAX_SHOWN = 60
"""Longest part of a value that a message repeats, in characters."""
MAX_PATH = 300
"""The same of a path, which should be whole: longer ones are accidents."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean X?` with the most similar known word, or nothing."""
    similar = difflib.get_close_matches(word[:MAX_SHOWN], list(known), n=1)
    return f"; did you mean {similar[0]}?" if similar else ""


def show(value: Any) -> str:
    """A value as a message repeats it: JSON, cut where it is long."""
    return shorten(json.dumps(value, ensure_ascii=not is_text(value), default=str))


def is_text(value: Any) -> bool:
    """Whether UTF-8 can hold a value; bytes of a command line that are not text arrive as halves of surrogate pairs."""
    try:
        str(value).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def shorten(text: str, most: int = MAX_SHOWN) -> str:
    """A text that a message repeats, cut where it is long."""
    return text if len(text) <= most else f"{text[:most]}..."


def percent(share: float) -> str:
    """A share between 0 and 1 with two digits that count: `0.56 %`, `100 %`."""
    return f"{float(f'{100 * share:.2g}'):g} %"


def printable(text: str) -> str:
    """A text that every terminal and file takes: NULs and halves of surrogate pairs are escaped."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8").replace("\0", "\\0")


def show_path(path: object) -> str:
    """A path as a message repeats it."""
    return shorten(printable(str(path)), MAX_PATH)


def listed(items: Iterable[object], most: int | None = None, last: str = "", separator: str = ", ") -> str:
    """Items in one line: `a, b, c`.

    Args:
        items: What is listed.
        most: Of more items than these the first ones are named, and how many follow: `a, b and 7 more`.
        last: The word before the last one: `a, b or c`.
        separator: Between two. With `; `, for phrases that have commas of their own, `and 7 more` is set off too.
    """
    words = [str(item) for item in items]
    if most is not None and len(words) > most:
        joint = " and" if separator == ", " else f"{separator}and"
        return f"{separator.join(words[:most])}{joint} {len(words) - most} more"
    if last and len(words) > 1:
        return f"{separator.join(words[:-1])} {last} {words[-1]}"
    return separator.join(words)
