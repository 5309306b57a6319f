"""Reading files and checking records: shared by all formats, so that every one reports problems in the same words."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from cl_dist.config.files import is_folder, is_there, read_bytes
from cl_dist.config.words import listed, printable
from cl_dist.errors import BadInput
from cl_dist.tasks.formats.format import DEV_NAMES, EmptyAnswers, Split
from cl_dist.tasks.types import Example

LISTED = 20
"""Most names that a message lists."""

FOREIGN = {
    b"\x1f\x8b": "gzip: unpack it",
    b"\xff\xfe": "UTF-16: convert it to UTF-8",
    b"\xfe\xff": "UTF-16: convert it to UTF-8",
    b"PAR1": "Parquet: format huggingface reads it",
    b"PK\x03\x04": "a zip file: unpack it",
}
"""What files begin with that are taken for text by mistake."""

logger = logging.getLogger(__name__)


def enumerate_names(names: Iterable[str]) -> str:
    """Names in one line: sorted, and cut short after `LISTED` of them; "nothing" where there are none."""
    # Half a surrogate pair, in a record's field or a file's name, would break whatever writes the message down.
    return listed(sorted(map(printable, names)), LISTED) or "nothing"


def missing(path: Path) -> BadInput:
    """The error for a file or folder that is not there; says what its nearest existing parent holds instead."""
    parent = next(folder for folder in path.parents if is_folder(folder))
    return BadInput(f"no file or folder {path}; {parent} has: {enumerate_names(list_folder(parent))}")


def list_folder(folder: Path) -> list[str]:
    """Names of what a folder holds; BadInput where it may not be read."""
    try:
        return os.listdir(folder)
    except OSError as error:
        raise BadInput(f"{folder} cannot be read: {error.strerror}") from error


def require_folder(path: Path) -> Path:
    """`path`, once it is known to be a folder that can be read; BadInput otherwise."""
    if not is_there(path):
        raise missing(path)
    if not is_folder(path):
        raise BadInput(f"{path} is a file, but this format needs a folder")
    list_folder(path)
    return path


def read_text(path: Path) -> str:
    """The whole file as UTF-8 text, without a byte order mark; BadInput where it cannot be read or is no such text."""
    if not is_there(path):
        raise missing(path)
    data = read_bytes(path)
    foreign = next((f" (it looks like {what})" for mark, what in FOREIGN.items() if data.startswith(mark)), "")
    if b"\0" in data:
        line = data.count(b"\n", 0, data.index(b"\0")) + 1
        raise BadInput(f"{path}, line {line}: not UTF-8 text (it holds NUL bytes){foreign}")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise BadInput(f"{path}, line {line}: not UTF-8 text (byte 0x{data[error.start]:02x}){foreign}") from error


class Doubled(dict[str, Any]):
    """A JSON object in which a key is given twice, with what it was given last."""

    keys_twice: frozenset[str]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A parsed JSON object; it says so where a key is given twice."""
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    doubled = Doubled(found)
    names = [name for name, _ in pairs]
    doubled.keys_twice = frozenset(name for name in names if names.count(name) > 1)
    return doubled


def parse_json(text: str, path: Path, first_line: int = 1) -> Any:
    """`json.loads` whose errors name the file and the line; `first_line` is the line where `text` starts.

    An object with a key that is given twice is a `Doubled`, which `require_once` refuses where that key is read.
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
    except ValueError as error:  # Python reads no whole number of more than 4,300 digits
        line = first_line + text.count("\n", 0, _huge_number(text))
        raise BadInput(f"{path}, line {line}: a number of too many digits") from error


def _huge_number(text: str) -> int:
    """Where the first number starts that has too many digits to be read."""
    found = re.search(rf"\d{{{sys.get_int_max_str_digits() + 1},}}", text)
    return 0 if found is None else found.start()


def require_once(record: Mapping[str, Any], field: str) -> None:
    """Raise BadInput where the record gives the field twice: which of the two is meant is anyone's guess."""
    if isinstance(record, Doubled) and field in record.keys_twice:
        raise BadInput(f"field {field!r} is given twice")


def read_json_list(path: Path) -> list[Any]:
    """The JSON list in a file; BadInput where it holds something else."""
    content = parse_json(read_text(path), path)
    if not isinstance(content, list):
        raise BadInput(f"{path} must hold a JSON list, not {json_type(content)}")
    return content


def read_json_object(path: Path, what: str) -> dict[str, Any]:
    """The JSON object in a file, with each of its keys once; BadInput, with `what` it must hold, for anything else."""
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
    """JSON's name of a parsed value's type; Python's where JSON has no such values (dates and bytes in data sets)."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else f"a {type(value).__name__}")


def text_field(record: Mapping[str, Any], field: str, may_be_empty: bool = False) -> str:
    """The text in a record's field; BadInput where it is absent, given twice, no string, empty or not encodable."""
    if field not in record:
        raise BadInput(f"no field {field!r}; the record has: {enumerate_names(map(str, record))}")
    require_once(record, field)
    value = record[field]
    if not isinstance(value, str):
        raise BadInput(f"field {field!r} must be a string, not {json_type(value)}")
    if not may_be_empty and not value.strip():
        raise BadInput(f"field {field!r} is empty")
    check_encodable(value, f"field {field!r}")
    return value


def check_encodable(value: str, what: str) -> str:
    """`value`; BadInput where it holds half a surrogate pair, which passes JSON's escapes but not the tokenizers."""
    try:
        if not value.isascii():
            value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadInput(f"{what} holds half a surrogate pair at character {error.start}") from error
    return value


def make_example(record: object, input_field: str, output_field: str) -> Example:
    """Prompt and answer of one record; the answer loses the white space around it and may be empty, which is for
    `collect` to judge. BadInput for a broken record.
    """
    if not isinstance(record, dict):
        raise BadInput(f"must be an object with {input_field!r} and {output_field!r}, not {json_type(record)}")
    return Example(prompt=text_field(record, input_field), answer=answer_field(record, output_field))


def answer_field(record: Mapping[str, Any], field: str) -> str:
    """The answer in a record's field, without the white space around it; it may be empty."""
    return text_field(record, field, may_be_empty=True).strip()


def make_document(record: object, field: str) -> Example:
    """The document in one record's text field; empty where the record's is blank. BadInput for a broken record."""
    if not isinstance(record, dict):
        raise BadInput(f"must be an object with {field!r}, not {json_type(record)}")
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
    """Convert numbered records into a split; a record that `convert` refuses is named by origin and number.

    empty: what becomes of a record with a prompt and an empty answer, which is in the field `answer_name`; the log says
    how many are skipped. Blank documents are always passed over. With `most` no more records are read once there are so
    many samples.
    """
    examples: list[Example] = []
    positions: list[int] = []
    skipped = 0
    for position, record in records:
        try:
            example = convert(record)
            if not example.answer and example.prompt and empty == "error":
                raise BadInput(
                    f"field {answer_name!r} is empty; stream.empty_answers: keep learns such records, skip drops them"
                )
        except BadInput as error:
            raise BadInput(f"{origin}, {unit} {position}: {error}") from error
        if not example.answer and not (example.prompt and empty == "keep"):
            skipped += bool(example.prompt)
            continue
        examples.append(example)
        positions.append(position)
        if len(examples) == most:
            break
    if skipped:
        logger.warning("%s: %d records with an empty answer are left out (stream.empty_answers)", origin, skipped)
    return Split(examples, str(origin), positions, unit)


def read_json_split(
    path: Path, convert: Callable[[Any], Example], empty: EmptyAnswers, answer_name: str = "output"
) -> Split:
    """A split stored as one JSON list of records."""
    return collect(path, enumerate(read_json_list(path)), convert, empty=empty, answer_name=answer_name)


def choose_evaluation(wanted: str, candidates: Mapping[str, Path]) -> Path:
    """The evaluation file: the wanted split's, else the other one's, and then the log says so.

    `candidates` maps "test" and "dev" to their files. Raises BadInput where neither exists.
    """
    if is_there(candidates[wanted]):
        return candidates[wanted]
    for path in candidates.values():
        if is_there(path):
            logger.warning("no %s file %s: evaluating on %s", wanted, candidates[wanted], path)
            return path
    raise missing(candidates[wanted])


def split_files(path: Path, extension: str, wanted: str) -> tuple[Path, Path]:
    """Training and evaluation file for a folder, or for a training file with its evaluation files beside it.

    Raises BadInput where a folder has no evaluation file; a lone file is its own evaluation file.
    """
    if is_folder(path):
        return path / f"train{extension}", choose_evaluation(wanted, evaluation_files(path, "", extension))
    return path, path if is_lone(path) else choose_evaluation(wanted, files_beside(path))


def is_lone(path: Path) -> bool:
    """Whether a training file has no evaluation file beside it."""
    return not any(is_there(file) for file in files_beside(path).values())


def files_beside(path: Path) -> dict[str, Path]:
    """The paths where the test and the dev split of a training file would be."""
    stem = "" if path.stem == "train" else path.stem.removesuffix(".train") + "."
    return evaluation_files(path.parent, stem, path.suffix)


def evaluation_files(folder: Path, stem: str, extension: str) -> dict[str, Path]:
    """The paths where the test and the dev split would be; for dev the first of its names that exists."""
    dev = first_existing(folder, [f"{stem}{name}{extension}" for name in DEV_NAMES])
    return {"test": folder / f"{stem}test{extension}", "dev": dev}


def first_existing(folder: Path, names: Iterable[str]) -> Path:
    """The first of the files that exists in the folder, else the first name's path (for the message)."""
    paths = [folder / name for name in names]
    return next((path for path in paths if is_there(path)), paths[0])


def match_name(name: str, available: Iterable[str]) -> list[str]:
    """The names equal to `name`, else those that differ from it in case only."""
    names = sorted(available)
    return [other for other in names if other == name] or [n for n in names if n.lower() == name.lower()]
