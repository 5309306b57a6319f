"""JSON Lines: one record per line, with prompt and answer, or a document, in fields that the recipe may name.

`path` is a folder with `train.jsonl` and `test.jsonl` or `dev.jsonl` (also `eval`, `validation`, `valid`, `val`), or
the training file `<name>.jsonl`, with its evaluation files `<name>.test.jsonl` and `<name>.dev.jsonl` next to it. A
lone file serves for both.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cl_dist.config.files import is_there
from cl_dist.tasks.formats.files import Records, collect, missing, parse_json, read_text, split_files
from cl_dist.tasks.formats.format import RawTask, Source, Split


class JsonLines(Records):
    """One JSON object per line."""

    name = "jsonl"
    summary = "`input`/`output` records"

    def read(self, source: Source) -> RawTask:
        """Read the training and the evaluation file of one task."""
        path = source.path()
        if not is_there(path):
            raise missing(path)
        train, evaluation = split_files(path, ".jsonl", source.eval_split)
        return RawTask(self._read_file(train, source), self._read_file(evaluation, source), kind=self.kind)

    def _read_file(self, path: Path, source: Source) -> Split:
        records, empty = parsed_lines(path), source.empty_answers
        return collect(path, records, self.convert, "line", empty=empty, answer_name=self.output_field)


def parsed_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Line number (from 1) and parsed value of each line. Blank lines are counted but skipped."""
    # splitlines() would also split at separators such as U+2028, which JSON strings may contain.
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            yield number, parse_json(line, path, first_line=number)
