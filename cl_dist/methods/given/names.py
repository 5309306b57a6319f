"""Reads the file of names, rows and columns, and finds the parameters that it names."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torch import nn

from cl_dist.config.files import read_bytes
from cl_dist.config.yaml_text import parse_yaml
from cl_dist.errors import BadInput
from cl_dist.models.kept_parts import Along
from cl_dist.models.structure import whole_shape

ALLOWED = "{rows: [0, 7, 32000-32003]}, {columns: [...]} or all"


@dataclass(frozen=True)
class Entry:
    """What the file says about a parameter."""

    along: Along | None
    """None: it is trained as a whole."""
    numbers: tuple[int, ...] = ()
    """Ascending."""


def read_file(path: str) -> dict[str, Entry]:
    """The file's entries by name or pattern.

    Raises:
        BadInput: It cannot be read, or an entry is none.
    """
    try:
        text = read_bytes(Path(path)).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(f"method.file: {path}: byte {error.start} is not UTF-8") from None
    content: Any = parse_yaml(text, f"method.file: {path}")
    if not isinstance(content, dict) or not content:
        raise BadInput(f"method.file: {path} is not a mapping of parameter names; allowed: NAME: {ALLOWED}")
    return {str(name): _entry(value, f"method.file: {path}: {name}") for name, value in content.items()}


def _entry(value: Any, place: str) -> Entry:
    if value == "all":
        return Entry(None)
    if not isinstance(value, dict) or len(value) != 1 or not set(value) <= {"rows", "columns"}:
        raise BadInput(f"{place}: {value!r} is not allowed; allowed: {ALLOWED}")
    [(along, written)] = value.items()
    numbers: set[int] = set()
    for each in written if isinstance(written, list) else [written]:
        numbers.update(_range(each, place))
    if not numbers:
        raise BadInput(f"{place}: the list of {along} is empty; leave the name out, or give at least one")
    return Entry(along, tuple(sorted(numbers)))


def _range(written: Any, place: str) -> range:
    first, dash, last = str(written).replace(" ", "").partition("-")
    if not isinstance(written, (int, str)) or isinstance(written, bool) or not first.isdecimal():
        raise BadInput(f"{place}: {written!r} is not allowed; allowed: {ALLOWED}")
    if not dash:
        return range(int(first), int(first) + 1)
    if not last.isdecimal() or int(last) < int(first):
        raise BadInput(f"{place}: {written!r} is not a range; allowed: the first and the last number, as in 3-7")
    return range(int(first), int(last) + 1)


def matched(entries: Mapping[str, Entry], model: nn.Module, path: str) -> dict[str, Entry]:
    """The entries by the names of the model's trainable parameters, in model order.

    Raises:
        BadInput: A name fits none, two fit the same parameter, or a number is too large.
    """
    shapes = {name: whole_shape(each) for name, each in model.named_parameters() if each.requires_grad}
    found: dict[str, tuple[str, Entry]] = {}
    for pattern, entry in entries.items():
        names = [name for name in shapes if name == pattern or fnmatchcase(name, pattern)]
        if not names:
            near = difflib.get_close_matches(pattern, shapes, n=3, cutoff=0.4)
            meant = f"; similar names: {', '.join(near)}" if near else ""
            raise BadInput(f"method.file: {path}: the model has no trainable parameter {pattern}{meant}")
        for name in names:
            if name in found:
                raise BadInput(f"method.file: {path}: {name} is named twice, by {found[name][0]} and {pattern}")
            found[name] = pattern, entry
            _check_numbers(name, entry, tuple(shapes[name]), path)
    return {name: found[name][1] for name in shapes if name in found}


def _check_numbers(name: str, entry: Entry, shape: tuple[int, ...], path: str) -> None:
    if entry.along is None:
        return
    if len(shape) != 2:
        raise BadInput(f"method.file: {path}: {name} of shape {shape} has no {entry.along}; allowed for it: all")
    # A Conv1D stores its weight transposed; `KeptPart` counts along the right axis, and checks again.
    if entry.numbers[-1] >= max(shape):
        raise BadInput(
            f"method.file: {path}: {name} of shape {shape} has no {entry.along.removesuffix('s')} {entry.numbers[-1]}"
        )
