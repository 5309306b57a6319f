"""Reading files and checking records: what formats share, so that all of them report problems in the same words."""

from __future__ import annotations

import gzip
import json
import logging
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from cl_dist.config.files import is_folder, is_there, read_bytes
from cl_dist.config.words import did_you_mean, listed, printable
from cl_dist.errors import BadInput
from cl_dist.tasks.formats.format import DEV_NAMES, EmptyAnswers, Split
from cl_dist.tasks.types import Example

LISTED = 20
"""Most names that one message lists."""

UTF_16 = b"\xff\xfe"
FOREIGN = {
    b"\x1f\x8b": "gzip: unpack it, or let its name end in .gz",
    b"\x28\xb5\x2f\xfd": "Zstandard: unpack it, or let its name end in .zst",
    UTF_16: "UTF-16: convert it to UTF-8",
    b"\xfe\xff": "UTF-16: convert it to UTF-8",
    b"PAR1": "Parquet: let its name end in .parquet",
    b"PK\x03\x04": "a zip file or an Excel workbook: unpack it, or export it as CSV in UTF-8",
    b"\xd0\xcf\x11\xe0": "an old Excel workbook: export it as CSV in UTF-8",
}
"""First bytes of files that are often mistaken for text, and what to do with such a file."""

logger = logging.getLogger(__name__)


def enumerate_names(names: Iterable[str]) -> str:
    """Names in one line, sorted, at most `LISTED` of them; "nothing" if there are none."""
    # A lone surrogate in a field or a file name would break whatever prints or stores the message.
    return listed(sorted(map(printable, names)), LISTED) or "nothing"


def missing(path: Path) -> BadInput:
    """The error for a missing file or folder. It lists what its nearest existing parent contains instead."""
    parent = next(folder for folder in path.parents if is_folder(folder))
    target = f" (it is a link to {os.readlink(path)}, which is not there)" if path.is_symlink() else ""
    return BadInput(f"no file or folder {path}{target}; {parent} has: {enumerate_names(list_folder(parent))}")


def list_folder(folder: Path) -> list[str]:
    """Names of a folder's entries. Raises BadInput if it cannot be read."""
    try:
        return os.listdir(folder)
    except OSError as error:
        raise BadInput(f"{folder} cannot be read: {error.strerror}") from error


def require_folder(path: Path) -> Path:
    """Return `path` if it is a readable folder. Raises BadInput otherwise."""
    if not is_there(path):
        raise missing(path)
    if not is_folder(path):
        raise BadInput(f"{path} is a file, but this format needs a folder")
    list_folder(path)
    return path


def read_text(path: Path) -> str:
    """The content of a UTF-8 file without its byte order mark, unpacked if its name ends in `.gz` or `.zst`.

    Raises BadInput if it cannot be read or unpacked, or is not UTF-8.
    """
    if not is_there(path):
        raise missing(path)
    data = unpacked(path, read_bytes(path))
    foreign = next((f" (it looks like {what})" for mark, what in FOREIGN.items() if data.startswith(mark)), "")
    if not foreign and 3 * data[:200].count(b"\0") > len(data[:200]):
        foreign = f" (it looks like {FOREIGN[UTF_16]})"  # without the mark at its start
    if b"\0" in data:
        line = data.count(b"\n", 0, data.index(b"\0")) + 1
        raise BadInput(f"{path}, line {line}: not UTF-8 text (it holds NUL bytes){foreign}")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        foreign = foreign or "; save the file as UTF-8"
        raise BadInput(f"{path}, line {line}: not UTF-8 text (byte 0x{data[error.start]:02x}){foreign}") from error


COMPRESSED = (".gz", ".zst")
"""Endings of compressed files."""


def unpacked(path: Path, data: bytes) -> bytes:
    """The content of a file, given its bytes. Raises BadInput if a compressed file is damaged."""
    unpack = {".gz": gzip.decompress, ".zst": _zstandard}.get(path.suffix.lower())
    try:
        return data if unpack is None else unpack(data)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        reason = " ".join(str(error).split())
        raise BadInput(f"{path} cannot be unpacked: {reason}") from error


def _zstandard(data: bytes) -> bytes:
    """Unpack all frames. Raises ValueError for damaged or incomplete ones."""
    import zstandard

    parts: list[bytes] = []
    while data:
        frame = zstandard.ZstdDecompressor().decompressobj()
        try:
            parts.append(frame.decompress(data))
        except zstandard.ZstdError as error:
            raise ValueError(str(error)) from error
        if not frame.eof:
            raise ValueError("its end is missing")
        data = frame.unused_data
    return b"".join(parts)


class Doubled(dict[str, Any]):
    """A JSON object that gives a key twice. It has the last value of each key."""

    keys_twice: frozenset[str]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    doubled = Doubled(found)
    names = [name for name, _ in pairs]
    doubled.keys_twice = frozenset(name for name in names if names.count(name) > 1)
    return doubled


def parse_json(text: str, path: Path, first_line: int = 1) -> Any:
    """`json.loads` with errors that name the file and the line. `first_line` is the line where `text` starts.

    An object with a duplicate key becomes a `Doubled`; `require_once` refuses it when that key is read.
    """
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        if not text.strip():
            raise BadInput(f"{path} is empty") from error
        line = first_line + error.lineno - 1
        raise BadInput(f"{path}, line {line}: not valid JSON ({error.msg}, column {error.colno})") from error
    except RecursionError as error:
        raise BadInput(f"{path}, line {first_line}: JSON nested too deeply") from error
    except ValueError as error:  # Python refuses whole numbers of more than 4,300 digits, without a position
        huge = re.search(rf"\d{{{sys.get_int_max_str_digits() + 1},}}", text)
        line = first_line + text.count("\n", 0, 0 if huge is None else huge.start())
        raise BadInput(f"{path}, line {line}: a number with too many digits") from error


def parsed_lines(path: Path, text: str | None = None) -> Iterator[tuple[int, Any]]:
    """Line number (from 1) and parsed value of each line of a JSON Lines file. Blank lines are counted but skipped.

    `text` is the file's content if it has been read already.
    """
    # splitlines() would also split at separators such as U+2028, which JSON strings may contain.
    for number, line in enumerate((read_text(path) if text is None else text).split("\n"), start=1):
        if line.strip():
            yield number, parse_json(line, path, first_line=number)


def require_once(record: Mapping[str, Any], field: str) -> None:
    """Raise BadInput if the record gives the field twice: nobody can say which of the two is meant."""
    if isinstance(record, Doubled) and field in record.keys_twice:
        raise BadInput(f"field {field!r} is given twice")


def read_json_list(path: Path) -> list[Any]:
    """The JSON list in a file. Raises BadInput if it contains anything else."""
    content = parse_json(read_text(path), path)
    if not isinstance(content, list):
        raise BadInput(f"{path} must hold a JSON list, not {json_type(content)}")
    return content


def read_json_object(path: Path, what: str) -> dict[str, Any]:
    """The JSON object in a file, without duplicate keys. Raises BadInput, with `what` it must hold, for others."""
    content = parse_json(read_text(path), path)
    if not isinstance(content, dict):
        raise BadInput(f"{path} must hold a JSON object {what}, not {json_type(content)}")
    for field in content:
        try:
            require_once(content, field)
        except BadInput as error:
            raise BadInput(f"{path}: {error}") from error
    return content


def json_type(value: object) -> str:
    """JSON's name for the type of a value; Python's name for types that only data sets have (dates, bytes)."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else f"a {type(value).__name__}")


def no_field(record: Mapping[str, Any], field: str, hint: str = "") -> BadInput:
    """The error for a record without a field."""
    names = list(map(printable, map(str, record)))
    return BadInput(f"no field {field!r}; the record has: {enumerate_names(names)}{did_you_mean(field, names)}{hint}")


def text_field(record: Mapping[str, Any], field: str, may_be_empty: bool = False) -> str:
    """The string in a record's field. Raises BadInput if it is missing, given twice, no string, empty or no UTF-8."""
    if field not in record:
        raise no_field(record, field)
    require_once(record, field)
    value = record[field]
    if not isinstance(value, str):
        raise BadInput(f"field {field!r} must be a string, not {json_type(value)}")
    if not may_be_empty and not value.strip():
        raise BadInput(f"field {field!r} is empty")
    check_encodable(value, f"field {field!r}")
    return value


def check_encodable(value: str, what: str) -> str:
    """Return `value`. Raises BadInput for a lone surrogate, which JSON's escapes allow but tokenizers do not."""
    try:
        if not value.isascii():
            value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadInput(f"{what} holds half a surrogate pair at character {error.start}") from error
    return value


def make_example(record: object, input_field: str, output_field: str) -> Example:
    """Prompt and answer of one record, the answer without white space around it. Raises BadInput for a broken record.

    The answer may be empty; `collect` decides what happens then.
    """
    if not isinstance(record, dict):
        raise BadInput(f"must be an object with {input_field!r} and {output_field!r}, not {json_type(record)}")
    return Example(prompt=text_field(record, input_field), answer=answer_field(record, output_field))


class NoAnswer(BadInput):
    """A record whose answer is null."""


def answer_field(record: Mapping[str, Any], field: str) -> str:
    """The answer in a record's field, without white space around it. It may be empty. Raises NoAnswer for null."""
    if field in record and record[field] is None:
        require_once(record, field)
        raise NoAnswer(f"field {field!r} must be a string, not null")
    return text_field(record, field, may_be_empty=True).strip()


def make_document(record: object, field: str) -> Example:
    """The document in a record's text field, which may be empty or null. Raises BadInput for a broken record."""
    if not isinstance(record, dict):
        raise BadInput(f"must be an object with {field!r}, not {json_type(record)}")
    if record.get(field, "") is None:
        record = {**record, field: ""}
    return Example(prompt="", answer=answer_field(record, field))


def collect(
    origin: Path | str,
    records: Iterable[tuple[int, Any]],
    convert: Callable[[Any], Example],
    unit: str = "record",
    most: int | None = None,
    empty: EmptyAnswers = "error",
    answer_name: str = "output",
) -> Split:
    """Convert numbered records into a split. Empty documents are always skipped, and counted like empty answers.

    Args:
        origin: File, or data set and split, for messages.
        records: Number and content of each record.
        convert: Makes a sample of a record, or raises BadInput.
        unit: What the numbers count, for messages.
        most: Stop reading after N samples; None: read all records.
        empty: What to do with a record that has a prompt but no answer; the log reports how many are skipped.
        answer_name: Field of the answer, for messages.

    Raises:
        BadInput: `convert` refused a record; the message names origin and number.
    """
    examples: list[Example] = []
    positions: list[int] = []
    skipped, blank = 0, 0
    for position, record in records:
        try:
            example = convert(record)
            if not example.answer and example.prompt and empty == "error":
                raise BadInput(
                    f"field {answer_name!r} is empty; stream.empty_answers: keep learns such records, skip drops them"
                )
        except BadInput as error:
            if isinstance(error, NoAnswer) and empty == "skip":
                skipped += 1
                continue
            hint = "; stream.empty_answers: skip drops such records" if isinstance(error, NoAnswer) else ""
            raise BadInput(f"{origin}, {unit} {position}: {error}{hint}") from error
        if not example.answer and not (example.prompt and empty == "keep"):
            skipped += bool(example.prompt)
            blank += not example.prompt
            continue
        examples.append(example)
        positions.append(position)
        if len(examples) == most:
            break
    if skipped:
        logger.warning("%s: skipped %d records with an empty answer (stream.empty_answers)", origin, skipped)
    if blank:
        logger.warning("%s: skipped %d empty documents", origin, blank)
    return Split(examples, str(origin), positions, unit)


def read_json_split(
    path: Path, convert: Callable[[Any], Example], empty: EmptyAnswers, answer_name: str = "output"
) -> Split:
    """A split stored as one JSON list of records."""
    return collect(path, enumerate(read_json_list(path)), convert, empty=empty, answer_name=answer_name)


def choose_evaluation(wanted: str, candidates: Mapping[str, Path]) -> Path:
    """The file to evaluate on: the wanted split's or, if it is missing, the other one's, which the log reports.

    `candidates` maps "test" and "dev" to their files. Raises BadInput if neither exists.
    """
    if is_there(candidates[wanted]):
        return candidates[wanted]
    for path in candidates.values():
        if is_there(path):
            logger.warning("no %s file %s: evaluating on %s", wanted, candidates[wanted], path)
            return path
    raise missing(candidates[wanted])


def split_files(path: Path, extension: str, wanted: str) -> tuple[Path, Path]:
    """Training and evaluation file of a folder, or of a training file whose evaluation files are next to it.

    A lone file serves for both. Raises BadInput if a folder has no evaluation file.
    """
    if is_folder(path):
        return path / f"train{extension}", choose_evaluation(wanted, evaluation_files(path, "", extension))
    return path, path if is_lone(path) else choose_evaluation(wanted, files_beside(path))


def is_lone(path: Path) -> bool:
    """Whether a training file has no evaluation file next to it."""
    return not any(is_there(file) for file in files_beside(path).values())


def files_beside(path: Path) -> dict[str, Path]:
    """The paths where the test and the dev split of a training file would be."""
    stem = "" if path.stem == "train" else path.stem.removesuffix(".train") + "."
    return evaluation_files(path.parent, stem, path.suffix)


def evaluation_files(folder: Path, stem: str, extension: str) -> dict[str, Path]:
    """The paths where the test and the dev split would be. Of the names for dev, the first existing one counts."""
    dev = [folder / f"{stem}{name}{extension}" for name in DEV_NAMES]
    return {
        "test": folder / f"{stem}test{extension}",
        "dev": next((path for path in dev if is_there(path)), dev[0]),
    }


def match_name(name: str, available: Iterable[str]) -> list[str]:
    """The names equal to `name`, or if there are none, those that differ only in case."""
    names = sorted(available)
    return [other for other in names if other == name] or [n for n in names if n.lower() == name.lower()]
