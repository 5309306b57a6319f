"""Counts the files that this process opens."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_folders: dict[str, list[str]] = {}
_hooked = False


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _folders:
        for folder, opened in _folders.items():
            if str(arguments[0]).startswith(folder):
                opened.append(str(arguments[0])[len(folder) + 1 :])


@contextmanager
def opened(folder: Path) -> Iterator[list[str]]:
    """The files below `folder` that are opened inside the block, relative to it, once for every time."""
    global _hooked
    if not _hooked:  # an audit hook stays for the life of the process
        sys.addaudithook(_note)
        _hooked = True
    found = _folders[str(folder)] = []
    try:
        yield found
    finally:
        del _folders[str(folder)]
