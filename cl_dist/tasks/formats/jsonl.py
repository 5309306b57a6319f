"""JSON Lines: one record a line, with the prompt and the answer, or a document, in fields that the recipe may name.

`path` is a folder with `train.jsonl` and `test.jsonl` or `dev.jsonl` (also `eval`, `validation`), or the training file
`<name>.jsonl`, whose evaluation files are `<name>.test.jsonl` and `<name>.dev.jsonl` beside it. A lone file serves as
both.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cl_dist.config.files import is_folder, is_there
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
from cl_dist.tasks.formats.source import RawTask, Source

DEV_NAMES = ("dev", "eval", "validation")

logger = logging.getLogger(__name__)


def read(source: Source) -> RawTask:
    """Read the training and the evaluation file of one task."""
    path = source.path()
    if not is_there(path):
        raise missing(path)
    train, evaluation = split_files(path, ".jsonl", source.stream.eval_split)
    convert = converter(source.task)
    empty, answer_name = source.stream.empty_answers, source.task.output_field
    return RawTask(
        train=collect(train, parsed_lines(train), convert, "line", empty=empty, answer_name=answer_name),
        evaluation=collect(evaluation, parsed_lines(evaluation), convert, "line", empty=empty, answer_name=answer_name),
        kind=kind_of(source.task),
    )


def split_files(path: Path, extension: str, wanted: str) -> tuple[Path, Path]:
    """Training and evaluation file for a folder, or for a training file with its evaluation files beside it.

    Raises BadInput where a folder has no evaluation file; a lone file is its own evaluation file, and the log says so.
    """
    if is_folder(path):
        return path / f"train{extension}", choose_evaluation(wanted, evaluation_files(path, "", extension))
    stem = "" if path.stem == "train" else path.stem.removesuffix(".train") + "."
    files = evaluation_files(path.parent, stem, path.suffix)
    if not any(is_there(file) for file in files.values()):
        logger.warning("no evaluation file such as %s: evaluating on %s, the training file", files[wanted].name, path)
        return path, path
    return path, choose_evaluation(wanted, files)


def evaluation_files(folder: Path, stem: str, extension: str) -> dict[str, Path]:
    """The paths where the test and the dev split would be; for dev the first of its names that exists."""
    dev = first_existing(folder, [f"{stem}{name}{extension}" for name in DEV_NAMES])
    return {"test": folder / f"{stem}test{extension}", "dev": dev}


def parsed_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Line number (from 1) and parsed value of each line; blank ones are passed over but counted."""
    # Not splitlines(): that would also cut at separators such as U+2028, which JSON strings may hold.
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            yield number, parse_json(line, path, first_line=number)
