"""Which samples every optimiser step learnt from: `data_order.jsonl`, one line per step that counts.

A line is `{"task": "spring", "step": 1, "samples": [...]}`, with `"skipped": true` where the update was left out.
Numbers are positions in the task's training data; beyond its own samples come those that methods added (replay). They
stand in the order of the global batch, of which every rank has the consecutive piece of its number. A run that resumes
takes back the lines of the steps that it repeats.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cl_dist.state.atomic import append_line, sync


class DataOrder:
    """The file, of which only one rank is the writer.

    Args:
        path: The file.
        tasks: Names of the stream's tasks, in order.
        writer: Whether this rank writes it.
    """

    def __init__(self, path: Path, tasks: Sequence[str], writer: bool) -> None:
        self._path, self._tasks, self._writer = path, tasks, writer

    def append(self, task: int, step: int, samples: Sequence[int], skipped: bool = False) -> None:
        """Add step `step` (from 1) of task `task` (from 0); `ClDistError` where the disk is full."""
        if self._writer:
            line = {"task": self._tasks[task], "step": step, "samples": list(samples)}
            append_line(self._path, {**line, "skipped": True} if skipped else line)

    def rewind(self, task: int, step: int) -> None:
        """Take back everything after the first `step` steps of task `task`; they are about to be trained (again)."""
        if not self._writer or not self._path.exists():
            return
        kept = 0
        with self._path.open("rb") as file:
            for line in file:
                if not self._counts(line, task, step):
                    break
                kept += len(line)
        os.truncate(self._path, kept)

    def sync(self) -> None:
        """Force the lines to the disk: the state that is about to be saved has learnt from them."""
        if self._writer and self._path.exists():
            sync(self._path)
            sync(self._path.parent)  # it may be new

    def _counts(self, line: bytes, task: int, step: int) -> bool:
        """Whether a line is whole, and of a step that stays done."""
        try:
            record: dict[str, Any] = json.loads(line)
            position = self._tasks.index(record["task"])
            return line.endswith(b"\n") and (position, record["step"]) <= (task, step)
        except (ValueError, KeyError, TypeError):  # a kill cut it off
            return False
