"""How thousands of skill units become the columns of one picture.

A handful of units get a column each. More are averaged: a column is one layer's module of a kind (`self_attn.q_proj`),
weighted by the number of elements, and the columns of a kind stand together, the layers from left to right. A large
model has some hundred of these, which a picture can show.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cl_dist.report.units import Indices, UnitTable

MAX_UNITS = 128
"""With more units than this they are averaged."""
MAX_BLOCKS = 32
"""So they are where they belong to more modules than this: their names would run into each other."""
OUTSIDE = "outside the layers"

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


@dataclass(frozen=True)
class Columns:
    """The columns of a picture, in blocks with a label each."""

    what: str
    """What the columns are: the axis' label."""
    blocks: tuple[tuple[str, int], ...]
    """Label and number of columns of each block, from left to right."""
    of_piece: Indices
    """`(pieces,)` the column of each piece of the units."""

    @property
    def count(self) -> int:
        """Number of columns."""
        return sum(width for _, width in self.blocks)


@dataclass(frozen=True, order=True)
class _Place:
    """Where a module lies: `model.layers.3.mlp.up_proj` is layer 3 of `model.layers`, kind `mlp.up_proj`."""

    stack: str
    kind: str
    layer: int


def columns_of_units(table: UnitTable) -> Columns:
    """A column per unit, a block per module, where there are few; else as `columns_of_modules`."""
    few = len(table.names) <= MAX_UNITS and len(table.modules) <= MAX_BLOCKS
    if not few or len(table.unit) > len(table.names) or len(table.names) == len(table.modules):
        return columns_of_modules(table)
    order = np.argsort(table.module, kind="stable")
    of_piece = np.empty_like(order)
    of_piece[order] = np.arange(len(order))
    widths = np.bincount(table.module).tolist()
    return Columns(
        "skill units, by module", tuple(zip(without_common_start(table.modules), widths, strict=True)), of_piece
    )


def columns_of_modules(table: UnitTable) -> Columns:
    """A column per layer and kind of module, a block per kind; what lies in no layer stands at the end.

    Modules of the same kind in the same layer, which numbers in their names tell apart (experts), share a column.
    """
    places = [_place(module) for module in table.modules]
    kinds = list(dict.fromkeys((place.stack, place.kind) for place in places if place.layer >= 0))
    rank = {kind: number for number, kind in enumerate(kinds)}
    ordered = sorted(dict.fromkeys(places), key=lambda place: (rank.get(_kind(place), len(rank)), place.layer))
    column = {place: number for number, place in enumerate(ordered)}
    of_module = np.array([column[place] for place in places])
    labels = _labels(kinds)
    widths: dict[str, int] = {}
    for place in ordered:
        label = labels[_kind(place)] if place.layer >= 0 else OUTSIDE
        widths[label] = widths.get(label, 0) + 1
    what = "modules by kind, in each kind from the first layer to the last (mean of a module's units by elements)"
    return Columns(what, tuple(widths.items()), of_module[table.module])


def _place(module: str) -> _Place:
    """A module without a number in its name lies in no layer, -1."""
    parts = module.split(".")
    at = next((index for index, part in enumerate(parts) if part.isdigit()), None)
    if at is None:
        return _Place("", module, -1)
    kind = _NUMBER.sub("*", ".".join(parts[at + 1 :]))
    return _Place(".".join(parts[:at]), kind, int(parts[at]))


def _kind(place: _Place) -> tuple[str, str]:
    return place.stack, place.kind


def _labels(kinds: Sequence[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """A label for every stack and kind; with several stacks (an encoder and a decoder) it names both."""
    stacks = list(dict.fromkeys(stack for stack, _ in kinds))
    if len(stacks) == 1:
        return {(stack, kind): kind or stack for stack, kind in kinds}
    short = dict(zip(stacks, without_common_start(stacks), strict=True))
    return {(stack, kind): f"{short[stack]} {kind}".strip() for stack, kind in kinds}


def without_common_start(names: Sequence[str]) -> list[str]:
    """Dotted names without the leading parts that all of them share; their last part stays."""
    split = [name.split(".") for name in names]
    common = 0
    while all(len(parts) > common + 1 and parts[common] == split[0][common] for parts in split):
        common += 1
    return [".".join(parts[common:]) for parts in split]
