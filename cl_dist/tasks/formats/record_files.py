"""Files of records: JSON Lines, JSON, CSV, TSV and Parquet, the text formats also compressed.

A reader knows nothing about prompts and answers; it says which columns a file has, and gives its records one by one
with their positions. Every cell of CSV and TSV is text.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cl_dist.config.files import is_there, refuse_special
from cl_dist.config.words import listed, show
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
    text = read_text(path)
    if text.lstrip().startswith("[") and isinstance(_value_or_none(text), list):
        raise BadInput(f"{path} holds one JSON list, not a record per line: let its name end in .json")
    return _of_lines(path, text)


def _value_or_none(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _of_lines(path: Path, text: str) -> RecordFile:
    first = next((record for _, record in parsed_lines(path, text)), None)
    return RecordFile(_fields(first), False, lambda _: parsed_lines(path, text), "line")


def _fields(record: Any) -> list[str]:
    return list(record) if isinstance(record, dict) else []


def _json(path: Path) -> RecordFile:
    """A list of records; or, as some tools write it, one record per line."""
    text = read_text(path)
    if text.lstrip().startswith("{"):
        first_line, _, more = text.strip().partition("\n")
        if _is_json(first_line) and (more or not _holds_records(json.loads(first_line))):
            return _of_lines(path, text)
        content = _one_value(text, path)
        raise BadInput(f"{path} must hold a JSON list of records, or one record per line, not {_single(content)}")
    records = parse_json(text, path)
    if not isinstance(records, list):
        raise BadInput(f"{path} must hold a JSON list of records, not {json_type(records)}")
    return RecordFile(_fields(records[0] if records else None), False, lambda _: enumerate(records), "record")


def _one_value(text: str, path: Path) -> Any:
    """The only JSON value in a file. Raises BadInput if there is none, or another one after it."""
    try:
        return parse_json(text, path)
    except BadInput as error:
        if "Extra data" in str(error):
            raise BadInput(
                f"{error}: a second value; allowed: one JSON list of records, or each record on a line of its own"
            ) from error
        raise


WRAPPERS = ("data", "examples", "records", "rows", "instances", "items")
"""Fields in which some tools put the list of records: `{"version": "1.1", "data": [...]}`."""


def _holds_records(value: Any) -> bool:
    return any(isinstance(value.get(name), list) for name in WRAPPERS)


def _single(content: Any) -> str:
    """An object instead of records, in words: with the field that seems to have them."""
    found = next((name for name, value in content.items() if isinstance(value, list)), None)
    return "a single object" if found is None else f"a single object; make the list in {show(found)} the whole file"


def _is_json(line: str) -> bool:
    return isinstance(_value_or_none(line), dict)


def _doubled(record: dict[str, Any], twice: frozenset[str]) -> Doubled:
    """The record, of which nobody may read the fields in `twice`."""
    doubled = Doubled(record)
    doubled.keys_twice = twice
    return doubled


SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}
"""Which separators of cells are read, and their names."""


def _separated(path: Path, usual: str) -> RecordFile:
    """CSV or TSV: a header, and a record per row; a cell in quotes may contain line ends and separators.

    The header decides what separates the cells: the separator that the file's ending stands for, unless the header has
    none of it, and another one.
    """
    text = read_text(path)
    start = text[: text.find("\n") + 1] if text[:4].lower() == "sep=" else ""  # Excel's own line
    text = text[len(start) :]
    separator = _separator(text, usual)
    rows = _numbered_rows(path, text, separator, first_line=1 + bool(start))
    line, written = next(rows, (0, []))
    header = [name.strip() for name in written]
    if not any(header):
        raise BadInput(f"{path} is empty")
    if len(header) == 1 and "|" in header[0]:
        named = listed((f"{name} ({show(mark)})" for mark, name in SEPARATORS.items()), last="or")
        raise BadInput(f"{path}, line {line}: the columns seem to be separated by '|'; allowed: {named}")
    twice = frozenset(name for name in header if header.count(name) > 1)

    def records(_: Sequence[str]) -> Iterator[tuple[int, Any]]:
        for line, cells in rows:
            if len(cells) != len(header):
                raise BadInput(f"{path}, line {line}: {len(cells)} cells, but the header has {len(header)}")
            record = dict(zip(header, cells, strict=True))
            yield line, _doubled(record, twice) if twice else record

    return RecordFile(header, True, records, "line")


def _separator(text: str, usual: str) -> str:
    """The separator of the cells of a header, the first line that is not blank."""
    header = next((line for line in text.split("\n") if line.strip()), "")
    bare = re.sub(r'"[^"]*"', "", header)
    return next((mark for mark in (usual, *SEPARATORS) if mark in bare), usual)


def _numbered_rows(path: Path, text: str, separator: str, first_line: int) -> Iterator[tuple[int, list[str]]]:
    """The rows that have anything in them, each with the line on which it starts: spreadsheets add rows without."""
    csv.field_size_limit(MOST_CELL)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    line = first_line
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            reason = "a quotation mark is never closed" if "unexpected end" in str(error) else str(error)
            if "expected after" in reason:
                reason += "; a cell that starts with a quotation mark ends with one, and has those inside it doubled"
            raise BadInput(f"{path}, line {line}: not valid CSV ({reason})") from error
        if cells is None:
            return
        if any(cell.strip() for cell in cells):
            yield line, cells
        line = first_line + reader.line_num


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

    twice = frozenset(name for name in columns if columns.count(name) > 1)

    def records(wanted: Sequence[str]) -> Iterator[tuple[int, Any]]:
        position = 0
        try:
            for batch in file.iter_batches(columns=[name for name in columns if name in wanted]):
                for record in batch.to_pylist():
                    yield position, _doubled(record, twice) if twice else record
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
