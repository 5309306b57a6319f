"""JSON Lines: one record per line, with prompt and answer, or a document, in fields that the recipe may name.

`path` is a folder with `train.jsonl` and `test.jsonl` or `dev.jsonl` (also `eval`, `validation`, `valid`, `val`), or
the training file `<name>.jsonl`, with its evaluation files `<name>.test.jsonl` and `<name>.dev.jsonl` next to it. A
lone file serves for both.
"""

from __future__ import annotations

from pathlib import Path

from cl_dist.config.files import is_folder, is_there
from cl_dist.tasks.formats.files import evaluation_files, files_beside, missing, split_files
from cl_dist.tasks.formats.format import RawTask, Source
from cl_dist.tasks.formats.records import Records

EXTENSION = ".jsonl"


class JsonLines(Records):
    """One JSON object per line."""

    name = "jsonl"
    summary = "`input`/`output` records"

    def read(self, source: Source) -> RawTask:
        """Read the training and the evaluation file of one task."""
        path = source.path()
        if not is_there(path):
            raise missing(path)
        if self.eval_fraction is None:
            train, evaluation = split_files(path, EXTENSION, source.eval_split)
            return self.read_files(source, [train], [evaluation])
        folder = is_folder(path)
        train = path / f"train{EXTENSION}" if folder else path
        beside: dict[str, Path] = evaluation_files(path, "", EXTENSION) if folder else files_beside(path)
        return self.read_files(source, [train], [file for file in beside.values() if is_there(file)])
