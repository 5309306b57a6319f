"""The skill units of a run as arrays: their modules, their importance to each task, and their shares in fusion.

Read from the files that methods with fusion write into each task's folder (docs/kif.md has the format). No torch: the
score vectors are small, and a report should start instantly.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from cl_dist.errors import BadInput
from cl_dist.state.run_folder import TaskFolder

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]

_WRONG_KIND = (ValueError, TypeError, AttributeError, RecursionError)
"""Raised when a value in a file has an unexpected type."""
_OF_LORA = re.compile(r"\.lora_[^.]+(\..*)?$")
"""The part of a LoRA matrix's name after the module's name."""


@dataclass(frozen=True)
class UnitTable:
    """The skill units of a model, divided into pieces: a piece is the part of one module that belongs to one unit."""

    names: tuple[str, ...]
    """Units, in the order of units.json."""
    modules: tuple[str, ...]
    """Modules, in order of first appearance."""
    unit: Indices
    """`(pieces,)` index of the piece's unit."""
    module: Indices
    """`(pieces,)` index of its module."""
    elements: Floats
    """`(pieces,)` number of its elements."""

    @staticmethod
    def from_json(units: Mapping[str, Any]) -> UnitTable:
        """Parse units.json: unit -> [{"parameter": name, "slices": one [start, stop] per dimension}].

        Raises:
            ValueError, TypeError, KeyError, AttributeError: `units` has another format.
        """
        # A unit may own slices of several parameters of one module (both LoRA matrices): they form a single piece.
        modules: dict[str, int] = {}
        pieces: dict[tuple[int, int], int] = {}
        for unit, slices in enumerate(units.values()):
            for entry in slices:
                key = (unit, modules.setdefault(module_of(entry["parameter"]), len(modules)))
                pieces[key] = pieces.get(key, 0) + _elements(entry["slices"])
        if not units or len({unit for unit, _ in pieces}) < len(units) or min(pieces.values()) < 1:
            raise ValueError("it has no units, or a unit without elements")
        keys = np.array(list(pieces), dtype=np.int64)
        return UnitTable(tuple(units), tuple(modules), keys[:, 0], keys[:, 1], np.array(list(pieces.values()), float))

    def elements_of_units(self) -> Floats:
        """`(units,)` number of elements."""
        elements: Floats = np.bincount(self.unit, self.elements, len(self.names)).astype(np.float64)
        return elements

    def mean(self, values: Floats, groups: Indices, count: int) -> Floats:
        """Mean of the units' values over groups of pieces, weighted by the number of elements.

        Args:
            values: `(tasks, units)`; a NaN makes its group's mean NaN.
            groups: `(pieces,)` group of each piece.
            count: Number of groups.

        Returns:
            `(tasks, count)`.
        """
        weights = np.bincount(groups, self.elements, count)
        sums = [np.bincount(groups, row[self.unit] * self.elements, count) for row in values]
        return np.array(sums).reshape(len(values), count) / weights

    def extremes(self, values: Floats) -> tuple[Floats, Floats]:
        """Smallest and largest value among each module's units: `(tasks, units)` to two `(tasks, modules)`."""
        shape = (len(values), len(self.modules))
        low, high = np.full(shape, np.inf), np.full(shape, -np.inf)
        with np.errstate(invalid="ignore"):  # a NaN makes both NaN
            for task, row in enumerate(values):
                np.minimum.at(low[task], self.module, row[self.unit])
                np.maximum.at(high[task], self.module, row[self.unit])
        return low, high


@dataclass(frozen=True)
class UnitResults:
    """The units' results for the finished tasks; rows are tasks."""

    table: UnitTable
    importance: Floats
    """`(tasks, units)` scores, min-max normalised per task: 1 is the most important unit, 0 the least important."""
    share_new: Floats
    """`(tasks, units)` share of the task's own weights after fusion; the first task is not fused (1)."""
    share_old: Floats
    """`(tasks, units)` share of the weights before the task."""
    shares_are_independent: bool
    """Whether the files have the old share, which then need not be 1 - new."""


def module_of(parameter: str) -> str:
    """The module of a parameter; a LoRA matrix belongs to the module that it adapts."""
    if _OF_LORA.search(parameter):
        return _OF_LORA.sub("", parameter)
    return parameter.rpartition(".")[0] or parameter


def correlation(importance: Floats) -> Floats:
    """Pearson correlation between the unit scores of each pair of tasks.

    Args:
        importance: `(tasks, units)`.

    Returns:
        `(tasks, tasks)`; NaN in the row and the column of a task whose scores are all equal or contain a NaN, since
        the correlation with a constant is undefined.
    """
    centred = importance - importance.mean(axis=1, keepdims=True)
    centred[is_constant(importance)] = np.nan
    norms = np.sqrt((centred**2).sum(axis=1))
    correlations = np.clip(centred @ centred.T / np.outer(norms, norms), -1.0, 1.0)
    defined = ~np.isnan(norms)
    correlations[defined, defined] = 1.0  # rather than 1 - 1e-16
    return correlations


def is_constant(importance: Floats) -> NDArray[np.bool_]:
    """`(tasks,)` whether all unit scores of a task are equal."""
    return importance.min(axis=1) == importance.max(axis=1)


def read_unit_results(folders: list[TaskFolder]) -> UnitResults | None:
    """Read the units and scores of the finished tasks; None if there are none because the method has no fusion.

    Raises:
        BadInput: A file is missing or damaged, or two tasks have different units.
    """
    if not any(path.exists() for folder in folders for path in (folder.units, folder.unit_scores)):
        return None
    table = _read_table(folders)
    scores = [_read_scores(folder.unit_scores, len(table.names)) for folder in folders]
    new = np.array([each["share_new"] for each in scores])
    old = np.array([each.get("share_old", 1.0 - each["share_new"]) for each in scores])
    importance = np.array([each["current_normalised"] for each in scores])
    return UnitResults(table, importance, new, old, any("share_old" in each for each in scores))


def _read_table(folders: list[TaskFolder]) -> UnitTable:
    """Read the units, which must be the same for all tasks. They are parsed only once: there may be a million."""
    first = _guarded(folders[0].units, Path.read_bytes)
    digest = hashlib.sha256(first).digest()
    for folder in folders[1:]:
        if hashlib.sha256(_guarded(folder.units, Path.read_bytes)).digest() != digest:
            raise BadInput(f"{folder.units} is damaged: it differs from {folders[0].units}, but units never change")
    return _guarded(folders[0].units, lambda path: UnitTable.from_json(json.loads(first)))


def _read_scores(path: Path, units: int) -> dict[str, Floats]:
    """The score vectors of a task that a report needs, `(units,)` each."""
    vectors = _guarded(path, load_file)
    wanted = ("current_normalised", "share_new")
    found = {name: vectors[name] for name in (*wanted, "share_old") if name in vectors}
    for name in wanted:
        if name not in found:
            raise BadInput(f"{path} is damaged: it has no vector {name}")
    for name, vector in found.items():
        if vector.shape != (units,):
            raise BadInput(f"{path} is damaged: {name} has shape {vector.shape}, but there are {units} units")
    return {name: vector.astype(np.float64) for name, vector in found.items()}


def _guarded(path: Path, read: Callable[[Path], Any]) -> Any:
    """The result of `read`; BadInput naming the file if it is missing or damaged."""
    try:
        return read(path)
    except FileNotFoundError as error:
        raise BadInput(f"{path} is missing, although other files that the method writes with it exist") from error
    except (OSError, SafetensorError, ArithmeticError, LookupError, *_WRONG_KIND) as error:
        raise BadInput(f"{path} is damaged: {error}") from error


def _elements(slices: list[list[int]]) -> int:
    """Number of elements selected by one slice per dimension."""
    return math.prod(int(stop) - int(start) for start, stop in slices)
