"""Files of records: JSON Lines, JSON, CSV, TSV and Parquet, the text formats also compressed.

A reader knows nothing about prompts and answers; it says which columns a file has, and gives its records one by one
with their positions. Every cell of CSV and TSV is text.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cl_dist.config.files import is_there, refuse_special
from cl_dist.errors import BadInput
from cl_dist.tasks.formats.files import (
    COMPRESSED,
    Doubled,
    json_type,
    missing,
    parse_json,
    parsed_lines,
    read_text,
)

MOST_CELL = 2**31 - 1
"""Most characters of a cell. Python's own limit, 131,072, is shorter than some documents."""


@dataclass(frozen=True)
class RecordFile:
    """An opened file."""

    columns: Sequence[str]
    """The columns of the file, or the fields of its first record. None if the file has no records."""
    has_header: bool
    """Whether `columns` holds for all records."""
    rows: Callable[[Sequence[str]], Iterator[tuple[int, Any]]]
    """Position and content of each record; a reader may leave out columns that are not asked for."""
    unit: str
    """What the positions count: lines from 1, or records from 0."""


def extension_of(path: Path) -> str | None:
    """The ending of a file of records (`.csv`, `.jsonl.gz`), in lower case; None for any other file."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] in COMPRESSED:
        packed = "".join(suffixes)
        return packed if suffixes[0] in READERS and suffixes[0] != ".parquet" else None
    return suffixes[-1] if suffixes and suffixes[-1] in READERS else None


def open_records(path: Path) -> RecordFile:
    """Open a file whose ending says what it is; any other is JSON Lines. Raises BadInput if it cannot be read."""
    if not is_there(path):
        raise missing(path)
    extension = extension_of(path) or ".jsonl"
    return READERS[f".{extension.split('.')[1]}"](path)


def _json_lines(path: Path) -> RecordFile:
    return _of_lines(path, read_text(path))


def _of_lines(path: Path, text: str) -> RecordFile:
    first = next((record for _, record in parsed_lines(path, text)), None)
    return RecordFile(_fields(first), False, lambda _: parsed_lines(path, text), "line")


def _fields(record: Any) -> list[str]:
    return list(record) if isinstance(record, dict) else []


def _json(path: Path) -> RecordFile:
    """A list of records; or, as some tools write it, one record per line."""
    text = read_text(path)
    if text.lstrip().startswith("{"):
        first_line = text.strip().split("\n", 1)[0]
        if _is_json(first_line):
            return _of_lines(path, text)
        parse_json(text, path)  # may have a better reason
        raise BadInput(f"{path} must hold a JSON list of records, or one record per line, not a single object")
    records = parse_json(text, path)
    if not isinstance(records, list):
        raise BadInput(f"{path} must hold a JSON list of records, not {json_type(records)}")
    return RecordFile(_fields(records[0] if records else None), False, lambda _: enumerate(records), "record")


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _separated(path: Path, separator: str) -> RecordFile:
    """CSV or TSV: a header, and a record per row; a cell in quotes may contain line ends and separators."""
    rows = _numbered_rows(path, separator)
    _, header = next(rows, (0, []))
    if not header:
        raise BadInput(f"{path} is empty")
    other = next((mark for mark in ";\t,|" if len(header) == 1 and mark in header[0]), None)
    if other is not None:
        named = {"\t": "tabs", ",": "commas"}.get(other, repr(other))
        wanted = "tabs (.tsv)" if separator == "\t" else "commas (.csv)"
        raise BadInput(f"{path}, line 1: the columns seem to be separated by {named}; allowed: {wanted}")
    twice = frozenset(name for name in header if header.count(name) > 1)

    def records(_: Sequence[str]) -> Iterator[tuple[int, Any]]:
        for line, cells in rows:
            if len(cells) != len(header):
                raise BadInput(f"{path}, line {line}: {len(cells)} cells, but the header has {len(header)}")
            record = dict(zip(header, cells, strict=True))
            if twice:
                record = Doubled(record)
                record.keys_twice = twice
            yield line, record

    return RecordFile(header, True, records, "line")


def _numbered_rows(path: Path, separator: str) -> Iterator[tuple[int, list[str]]]:
    """The rows that are not blank, each with the line on which it starts."""
    text = read_text(path)
    csv.field_size_limit(MOST_CELL)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    line = 1
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            reason = "a quotation mark is never closed" if "unexpected end" in str(error) else str(error)
            raise BadInput(f"{path}, line {line}: not valid CSV ({reason})") from error
        if cells is None:
            return
        if cells:
            yield line, cells
        line = reader.line_num + 1


def has_classes(path: Path) -> bool:
    """Whether a Parquet file is from a data set with a column of classes, whose names the `datasets` library knows."""
    import pyarrow
    import pyarrow.parquet

    refuse_special(path)
    try:
        metadata = pyarrow.parquet.read_schema(path).metadata or {}
    except (OSError, ValueError, pyarrow.ArrowException):  # reading the file reports it
        return False
    return b'"ClassLabel"' in metadata.get(b"huggingface", b"")


def _parquet(path: Path) -> RecordFile:
    import pyarrow
    import pyarrow.parquet

    refuse_special(path)

    def failed(error: Exception) -> BadInput:
        return BadInput(f"{path} cannot be read as Parquet: {' '.join(str(error).split())}")

    try:
        file = pyarrow.parquet.ParquetFile(path)
        columns = file.schema_arrow.names
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise failed(error) from error

    def records(wanted: Sequence[str]) -> Iterator[tuple[int, Any]]:
        position = 0
        try:
            for batch in file.iter_batches(columns=[name for name in columns if name in wanted]):
                for record in batch.to_pylist():
                    yield position, record
                    position += 1
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            raise failed(error) from error

    return RecordFile(columns, True, records, "record")


READERS: dict[str, Callable[[Path], RecordFile]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": lambda path: _separated(path, ","),
    ".tsv": lambda path: _separated(path, "\t"),
    ".parquet": _parquet,
}
"""By the ending of a file's name, without that of its compression."""
EXTENSIONS = tuple(
    f"{kind}{packed}" for kind in READERS for packed in ("", *COMPRESSED) if not (kind == ".parquet" and packed)
)
"""Every ending of a file of records."""
