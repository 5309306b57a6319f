"""Which samples each optimiser step was trained on: `data_order.jsonl`, one line per completed step.

A line is `{"task": "spring", "step": 1, "samples": [...]}`, with `"skipped": true` if the update was skipped. Samples
are numbered by their position in the task's training data, followed by those that methods added (replay). They are in
the order of the global batch, and rank r trains on the r-th consecutive piece of it. A run that resumes removes the
lines of the steps that it repeats.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from cl_dist.state.atomic import LineFile, sync

_BLOCK = 1 << 20
"""Bytes that are read at once."""


class DataOrder:
    """The file; only one rank writes it.

    Args:
        path: The file.
        tasks: Names of the stream's tasks, in order.
        writer: Whether this rank is the one that writes it.
    """

    def __init__(self, path: Path, tasks: Sequence[str], writer: bool) -> None:
        self._path, self._tasks, self._writer = path, tasks, writer
        self._lines = LineFile(path)

    def append(self, task: int, step: int, samples: Sequence[int], skipped: bool = False) -> None:
        """Append step `step` (from 1) of task `task` (from 0). Raises `ClDistError` if the disk is full."""
        if self._writer:
            line = {"task": self._tasks[task], "step": step, "samples": list(samples)}
            self._lines.append({**line, "skipped": True} if skipped else line)

    def rewind(self, task: int, step: int) -> None:
        """Remove everything after the first `step` steps of task `task`, which are about to be trained (again)."""
        if not self._writer or not self._path.exists():
            return
        with self._path.open("rb") as file:
            kept = next((end for end, line in _from_the_end(file) if self._counts(line, task, step)), 0)
        os.truncate(self._path, kept)

    def sync(self) -> None:
        """Flush the lines to disk, before a state that was trained on these samples is saved."""
        if self._writer and self._path.exists():
            sync(self._path)
            sync(self._path.parent)  # the file may be new

    def _counts(self, line: bytes, task: int, step: int) -> bool:
        """Whether a line is complete and belongs to a step that is kept."""
        try:
            record: dict[str, Any] = json.loads(line)
            position = self._tasks.index(record["task"])
            return line.endswith(b"\n") and (position, record["step"]) <= (task, step)
        except (ValueError, KeyError, TypeError):  # a kill cut it off
            return False


def _from_the_end(file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """The lines of a file, last one first, each with the position after it.

    A resume takes back a few steps, and need not read those of a long run before them.
    """
    position, rest = file.seek(0, os.SEEK_END), b""
    end = position
    while position > 0:
        start = max(0, position - _BLOCK)
        file.seek(start)
        rest = file.read(position - start) + rest
        position = start
        lines = rest.splitlines(keepends=True)
        # The first line in what was read may have begun before it.
        rest = b"" if position == 0 else lines.pop(0)
        for line in reversed(lines):
            yield end, line
            end -= len(line)
