"""The scores of a run: `scores.jsonl`, an append-only file. The manifest says which of its lines count.

With T tasks there are T² scores. In the manifest, which is always replaced as a whole, each new score would rewrite T²
numbers; here it adds one line. A line is a complete row of the accuracy matrix (`row`, and `cut` if answers were
generated) or one score of the current row (`task`, `score`, and `how` it was obtained), with a checksum. Lines that the
manifest does not refer to were left by a kill or by a task that was trained again; they are never read.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from cl_dist.errors import BadInput
from cl_dist.state.atomic import finite, raising_disk_full, sync
from cl_dist.state.integrity import CheckpointDamaged, StateUnusable
from cl_dist.state.stored_files import read_stored

Row = tuple[float | None, ...]
"""A score for each task of the stream; None for a task that was not evaluated."""

Cut = tuple[int | None, ...]
"""For each task of a row, how many generated answers were cut; None if none were generated. Empty: for no task."""

How = dict[str, str | int]
"""How a task was scored: the entries of `cl_dist.state.manifest.SCORING` that apply."""


class TaskScored(NamedTuple):
    """One score of the current row."""

    task: int
    """Position in the stream, from 0."""
    score: float | None
    """None if it is not a finite number."""
    how: How
    """Empty if the manifest has it."""


class ScoreFile:
    """Reads and appends to `scores.jsonl`.

    Args:
        path: The file, which need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def end(self) -> int:
        """Size in bytes: everything appended from now on comes after this offset."""
        return self.path.stat().st_size if self.path.exists() else 0

    def append_rows(self, rows: Sequence[Row], cuts: Sequence[Cut] = ()) -> tuple[int, ...]:
        """Append complete rows, with how many answers were cut, durably, and return their byte offsets.

        Raises `ClDistError` if the disk is full.
        """
        return self._append(
            [
                {"row": finite(list(row)), **({"cut": list(cut)} if cut else {})}
                for row, cut in zip_longest(rows, cuts, fillvalue=())
            ]
        )

    def append_scores(self, scores: Sequence[TaskScored]) -> None:
        """Append scores of the current row, durably. Raises `ClDistError` if the disk is full."""
        self._append(
            [
                {"task": each.task, "score": finite(each.score), **({"how": each.how} if each.how else {})}
                for each in scores
            ]
        )

    def _append(self, records: Sequence[dict[str, Any]]) -> tuple[int, ...]:
        if not records:
            return ()
        is_new = not self.path.exists()
        with raising_disk_full(self.path):
            # A full disk or a power loss may have cut off the last line: do not append to that.
            place = self.end() + (0 if self._ends_a_line() else 1)
            lines = [_sealed(record) for record in records]
            with self.path.open("ab") as file:
                file.write((b"" if self._ends_a_line() else b"\n") + b"".join(lines))
                file.flush()
                os.fsync(file.fileno())
            if is_new:
                sync(self.path.parent)
        places = []
        for line in lines:
            places.append(place)
            place += len(line)
        return tuple(places)

    def _ends_a_line(self) -> bool:
        if self.end() == 0:
            return True
        with self.path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"

    def rows(self, places: Sequence[int]) -> tuple[Row, ...]:
        """Read the rows at these byte offsets. Raises `BadInput` if one is missing or damaged."""
        return tuple(row for row, _ in self.rows_and_cuts(places))

    def rows_and_cuts(self, places: Sequence[int]) -> tuple[tuple[Row, Cut], ...]:
        """Read the rows at these byte offsets, with how many answers were cut. Raises as `rows`."""
        if not places:
            return ()
        content = self._read()
        return tuple(self._row(content, number, place) for number, place in enumerate(places))

    def _row(self, content: bytes, number: int, place: int) -> tuple[Row, Cut]:
        end = content.find(b"\n", place)
        record = _opened(content[place:end]) if 0 <= place < end else None
        if record is None or not isinstance(record.get("row"), list):
            raise BadInput(f"{self.path} is damaged: row {number} of the accuracy matrix is not at byte {place}")
        return tuple(record["row"]), tuple(record.get("cut", ()))

    def scores_after(self, place: int) -> Iterator[TaskScored]:
        """The scores of single tasks after a byte offset; damaged lines are skipped."""
        if self.end() <= place:
            return
        for line in self._read()[place:].splitlines():
            record = _opened(line)
            if record is not None and "task" in record:
                yield TaskScored(int(record["task"]), record["score"], record.get("how", {}))

    def _read(self) -> bytes:
        try:
            return read_stored(self.path)
        except (CheckpointDamaged, StateUnusable) as error:
            raise BadInput(f"{error}, and it holds the run's scores") from error


def _sealed(record: dict[str, Any]) -> bytes:
    """A record with its checksum, as one line."""
    return json.dumps({**record, "crc32": _checksum(record)}, separators=(",", ":")).encode() + b"\n"


def _opened(line: bytes) -> dict[str, Any] | None:
    """The record in a line; None if it was cut off or changed."""
    try:
        record = json.loads(line)
        expected = record.pop("crc32")
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        return None
    return record if _checksum(record) == expected else None


def _checksum(record: dict[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(record, sort_keys=True, separators=(',', ':')).encode()):08x}"
