"""Ways to damage a stored file."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def _flip(path: Path, share: float) -> None:
    """Flip one bit of the byte at `share` of the file's length."""
    content = bytearray(path.read_bytes())
    content[min(len(content) - 1, int(share * len(content)))] ^= 1
    path.write_bytes(content)


def _truncate(path: Path, share: float) -> None:
    os.truncate(path, int(share * path.stat().st_size))


DAMAGES: dict[str, Callable[[Path], None]] = {
    "first byte flipped": lambda path: _flip(path, 0.0),
    "middle byte flipped": lambda path: _flip(path, 0.5),
    "last byte flipped": lambda path: _flip(path, 1.0),
    "half of it": lambda path: _truncate(path, 0.5),
    "nothing of it": lambda path: _truncate(path, 0.0),
    "deleted": Path.unlink,
}
