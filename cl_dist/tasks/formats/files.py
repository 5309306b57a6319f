"""Reading files and checking records: shared by all formats, so that every one reports problems in the same words."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from cl_dist.config.schema import TaskConfig
from cl_dist.errors import BadInput
from cl_dist.tasks.formats.source import Split
from cl_dist.tasks.types import Example, Kind

LISTED = 20
"""Most names that a message lists."""

logger = logging.getLogger(__name__)


def enumerate_names(names: Iterable[str]) -> str:
    """Names in one line: sorted, and cut short after `LISTED` of them; "nothing" where there are none."""
    ordered = sorted(names)
    rest = [f"and {len(ordered) - LISTED} more"] if len(ordered) > LISTED else []
    return ", ".join(ordered[:LISTED] + rest) or "nothing"


def missing(path: Path) -> BadInput:
    """The error for a file or folder that is not there; says what its nearest existing parent holds instead."""
    parent = next(folder for folder in path.parents if folder.is_dir())
    return BadInput(f"no file or folder {path}; {parent} has: {enumerate_names(p.name for p in parent.iterdir())}")


def require_folder(path: Path) -> Path:
    """`path`, once it is known to be a folder; BadInput otherwise."""
    if not path.exists():
        raise missing(path)
    if not path.is_dir():
        raise BadInput(f"{path} is a file, but this format needs a folder")
    return path


def read_text(path: Path) -> str:
    """The whole file as UTF-8 text, without a byte order mark; BadInput where it cannot be read or decoded."""
    if not path.exists():
        raise missing(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise BadInput(f"{path}, line {line}: not UTF-8 text (byte 0x{data[error.start]:02x})") from error


def parse_json(text: str, path: Path, first_line: int = 1) -> Any:
    """`json.loads` whose errors name the file and the line; `first_line` is the line where `text` starts."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise BadInput(f"{path}, line {line}: not valid JSON ({error.msg}, column {error.colno})") from error
    except RecursionError as error:
        raise BadInput(f"{path}, line {first_line}: JSON nested too deeply") from error


def read_json_list(path: Path) -> list[Any]:
    """The JSON list in a file; BadInput where it holds something else."""
    content = parse_json(read_text(path), path)
    if not isinstance(content, list):
        raise BadInput(f"{path} must hold a JSON list, not {json_type(content)}")
    return content


def json_type(value: object) -> str:
    """JSON's name of a parsed value's type."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def text_field(record: Mapping[str, Any], field: str) -> str:
    """The text in a record's field; BadInput where it is absent, no string, empty or not encodable."""
    if field not in record:
        raise BadInput(f"no field {field!r}; the record has: {enumerate_names(map(str, record))}")
    value = record[field]
    if not isinstance(value, str):
        raise BadInput(f"field {field!r} must be a string, not {json_type(value)}")
    if not value.strip():
        raise BadInput(f"field {field!r} is empty")
    if not value.isascii():
        check_encodable(value, field)
    return value


def check_encodable(value: str, field: str) -> None:
    """Half a surrogate pair passes JSON's escapes but not the tokenizers: BadInput for such text."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadInput(f"field {field!r} holds half a surrogate pair at character {error.start}") from error


def make_example(record: object, input_field: str, output_field: str) -> Example:
    """Prompt and answer of one record; the answer loses the white space around it. BadInput for a broken record."""
    if not isinstance(record, dict):
        raise BadInput(f"must be an object with {input_field!r} and {output_field!r}, not {json_type(record)}")
    return Example(prompt=text_field(record, input_field), answer=text_field(record, output_field).strip())


def make_document(record: object, field: str) -> Example:
    """The document in one record's text field; empty where the record's is blank. BadInput for a broken record."""
    if not isinstance(record, dict):
        raise BadInput(f"must be an object with {field!r}, not {json_type(record)}")
    if field in record and isinstance(record[field], str) and not record[field].strip():
        return Example(prompt="", answer="")
    return Example(prompt="", answer=text_field(record, field).strip())


def converter(task: TaskConfig) -> Callable[[Any], Example]:
    """What turns a record with the fields that the recipe names into a sample."""
    if task.text_field is not None:
        return partial(make_document, field=task.text_field)
    return partial(make_example, input_field=task.input_field, output_field=task.output_field)


def kind_of(task: TaskConfig) -> Kind | None:
    """`text` where the recipe names a field with documents; else the answers will tell."""
    return "text" if task.text_field is not None else None


def collect(
    origin: Path | str,
    records: Iterable[tuple[int, Any]],
    convert: Callable[[Any], Example],
    unit: str = "record",
    most: int | None = None,
) -> Split:
    """Convert numbered records into a split; a record that `convert` refuses is named by origin and number.

    Blank documents are passed over. With `most` no more records are read once there are so many samples.
    """
    examples, positions = [], []
    for position, record in records:
        try:
            example = convert(record)
        except BadInput as error:
            raise BadInput(f"{origin}, {unit} {position}: {error}") from error
        if not example.answer:
            continue
        examples.append(example)
        positions.append(position)
        if len(examples) == most:
            break
    return Split(examples, str(origin), positions, unit)


def read_json_split(path: Path, convert: Callable[[Any], Example]) -> Split:
    """A split stored as one JSON list of records."""
    return collect(path, enumerate(read_json_list(path)), convert)


def choose_evaluation(wanted: str, candidates: Mapping[str, Path]) -> Path:
    """The evaluation file: the wanted split's, else the other one's, and then the log says so.

    `candidates` maps "test" and "dev" to their files. Raises BadInput where neither exists.
    """
    if candidates[wanted].is_file():
        return candidates[wanted]
    for path in candidates.values():
        if path.is_file():
            logger.warning("no %s file %s: evaluating on %s", wanted, candidates[wanted], path)
            return path
    raise missing(candidates[wanted])


def first_existing(folder: Path, names: Iterable[str]) -> Path:
    """The first of the files that exists in the folder, else the first name's path (for the message)."""
    paths = [folder / name for name in names]
    return next((path for path in paths if path.is_file()), paths[0])


def match_name(name: str, available: Iterable[str]) -> list[str]:
    """The names equal to `name`, else those that differ from it in case only."""
    names = sorted(available)
    return [other for other in names if other == name] or [n for n in names if n.lower() == name.lower()]
