"""JSON Lines: one record a line, with the prompt and the answer, or a document, in fields that the recipe may name.

`path` is a folder with `train.jsonl` and `test.jsonl` or `dev.jsonl` (also `eval`, `validation`), or the training file
`<name>.jsonl`, whose evaluation files are `<name>.test.jsonl` and `<name>.dev.jsonl` beside it. A lone file serves as
both.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cl_dist.tasks.formats.files import (
    choose_evaluation,
    collect,
    converter,
    first_existing,
    kind_of,
    missing,
    parse_json,
    read_text,
)
from cl_dist.tasks.formats.source import RawTask, Source, Split
from cl_dist.tasks.types import Example

DEV_NAMES = ("dev", "eval", "validation")

logger = logging.getLogger(__name__)


def read(source: Source) -> RawTask:
    """Read the training and the evaluation file of one task."""
    path = source.path()
    if not path.exists():
        raise missing(path)
    train, evaluation = split_files(path, ".jsonl", source.stream.eval_split)
    convert = converter(source.task)
    return RawTask(
        train=read_lines(train, convert), evaluation=read_lines(evaluation, convert), kind=kind_of(source.task)
    )


def split_files(path: Path, extension: str, wanted: str) -> tuple[Path, Path]:
    """Training and evaluation file for a folder, or for a training file with its evaluation files beside it.

    Raises BadInput where a folder has no evaluation file; a lone file is its own evaluation file, and the log says so.
    """
    if path.is_dir():
        return path / f"train{extension}", choose_evaluation(wanted, evaluation_files(path, "", extension))
    stem = "" if path.stem == "train" else path.stem.removesuffix(".train") + "."
    files = evaluation_files(path.parent, stem, path.suffix)
    if not any(file.is_file() for file in files.values()):
        logger.warning("no evaluation file such as %s: evaluating on %s, the training file", files[wanted].name, path)
        return path, path
    return path, choose_evaluation(wanted, files)


def evaluation_files(folder: Path, stem: str, extension: str) -> dict[str, Path]:
    """The paths where the test and the dev split would be; for dev the first of its names that exists."""
    dev = first_existing(folder, [f"{stem}{name}{extension}" for name in DEV_NAMES])
    return {"test": folder / f"{stem}test{extension}", "dev": dev}


def read_lines(path: Path, convert: Callable[[Any], Example]) -> Split:
    """All records of a file; blank lines are passed over but counted."""
    return collect(path, parsed_lines(path), convert, unit="line")


def parsed_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Line number (from 1) and parsed value of each line that is not blank."""
    # Not splitlines(): that would also cut at separators such as U+2028, which JSON strings may hold.
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            yield number, parse_json(line, path, first_line=number)
