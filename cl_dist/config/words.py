"""How a message repeats what its reader has written."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from typing import Any

MAX_SHOWN = 60
"""Longest part of a value that a message repeats, in characters."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean X?` with the most similar known word, or nothing."""
    similar = difflib.get_close_matches(word[:MAX_SHOWN], list(known), n=1)
    return f"; did you mean {similar[0]}?" if similar else ""


def show(value: Any) -> str:
    """A value as a message repeats it: JSON, cut where it is long."""
    return shorten(json.dumps(value, ensure_ascii=False, default=str))


def shorten(text: str) -> str:
    """A text that a message repeats, cut where it is long."""
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."
