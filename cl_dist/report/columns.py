"""How thousands of skill units become the columns of one picture.

A handful of units get a column each. More are averaged: a column is one layer's module of a kind (`self_attn.q_proj`),
weighted by the number of elements, and the columns of a kind stand together, the layers from left to right. A large
model has some hundred of these, which a picture can show.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from cl_dist.report.units import Indices, UnitTable

MAX_UNITS = 128
"""With more units than this they are averaged."""
MAX_BLOCKS = 32
"""So they are where they belong to more modules than this: their names would run into each other."""
MAX_NAMED = 64
"""With more columns than this there is no room for the name of each module outside the layers."""
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


@dataclass(frozen=True)
class _Place:
    """Where a module lies: `model.layers.3.mlp.up_proj` is layer 3 of the kind (`model.layers`, `mlp.up_proj`)."""

    kind: tuple[str, str]
    """The stack of layers, and the module in a layer; of a module in no layer its name alone."""
    layer: int
    """-1: in no layer."""


def columns_of_units(table: UnitTable) -> Columns:
    """A column per unit, a block per module, where there are few; else as `columns_of_modules`."""
    few = len(table.names) <= MAX_UNITS and len(table.modules) <= MAX_BLOCKS
    if not few or len(table.unit) > len(table.names) or len(table.names) == len(table.modules):
        return columns_of_modules(table)
    order = np.argsort(table.module, kind="stable")
    of_piece = np.empty_like(order)
    of_piece[order] = np.arange(len(order))
    widths = np.bincount(table.module).tolist()
    return Columns("skill units, by module", tuple(zip(_module_labels(table.modules), widths, strict=True)), of_piece)


def columns_of_modules(table: UnitTable) -> Columns:
    """A column per layer and kind of module, a block per kind; what lies in no layer stands at the end.

    Modules of the same kind in the same layer, which numbers in their names tell apart (experts), share a column.
    """
    places = [_place(module) for module in table.modules]
    kinds = list(dict.fromkeys(place.kind for place in sorted(places, key=lambda place: place.layer < 0)))
    rank = {kind: number for number, kind in enumerate(kinds)}
    ordered = sorted(dict.fromkeys(places), key=lambda place: (place.layer < 0, rank[place.kind], place.layer))
    column = {place: number for number, place in enumerate(ordered)}
    of_module = np.array([column[place] for place in places])
    what = "modules by kind, in each kind from the first layer to the last (mean of a module's units by elements)"
    return Columns(what, _blocks(ordered), of_module[table.module])


def _blocks(places: Sequence[_Place]) -> tuple[tuple[str, int], ...]:
    """Label and width of each kind; of what lies in no layer alone where its names have room."""
    inside = [place for place in places if place.layer >= 0]
    outside = [place for place in places if place.layer < 0]
    labels = _labels(list(dict.fromkeys(place.kind for place in inside)))
    blocks = [
        (" ".join(labels[kind]).strip(), len(list(group))) for kind, group in groupby(inside, lambda place: place.kind)
    ]
    if len(places) <= MAX_NAMED:
        return (*blocks, *((name, 1) for name in without_common_start([place.kind[1] for place in outside])))
    return (*blocks, (OUTSIDE, len(outside))) if outside else tuple(blocks)


def _place(module: str) -> _Place:
    """The first number in a module's name is its layer; a module without one lies in none."""
    parts = module.split(".")
    at = next((index for index, part in enumerate(parts) if part.isdigit()), None)
    if at is None:
        return _Place(("", module), -1)
    return _Place((".".join(parts[:at]), _NUMBER.sub("*", ".".join(parts[at + 1 :]))), int(parts[at]))


def _labels(kinds: Sequence[tuple[str, str]]) -> dict[tuple[str, str], tuple[str, str]]:
    """A short name for every kind's stack, such as `encoder`, empty where there is one alone; and for the kind itself,
    such as `SelfAttention.q`.
    """
    short = {(stack, kind): _tail(kind) or stack for stack, kind in kinds}
    if len({(stack, tail) for (stack, _), tail in short.items()}) < len(kinds):
        short = {(stack, kind): kind or stack for stack, kind in kinds}
    stacks = list(dict.fromkeys(stack for stack, _ in kinds))
    names = _without_common_end(without_common_start(stacks)) if len(stacks) > 1 else [""] * len(stacks)
    of_stack = dict(zip(stacks, names, strict=True))
    return {(stack, kind): (of_stack[stack], short[stack, kind]) for stack, kind in kinds}


def _module_labels(modules: Sequence[str]) -> list[str]:
    """Short labels of single modules: `0 self_attn.q_proj`; whole names where these would not tell them apart."""
    places = [_place(module) for module in modules]
    labels = _labels(list(dict.fromkeys(place.kind for place in places if place.layer >= 0)))
    short = [_label(place, labels) for place in places]
    return short if len(set(short)) == len(short) else without_common_start(modules)


def _label(place: _Place, labels: Mapping[tuple[str, str], tuple[str, str]]) -> str:
    if place.layer < 0:
        return place.kind[1]
    stack, kind = labels[place.kind]
    return f"{stack} {place.layer} {kind}".strip()


def _tail(kind: str) -> str:
    """The last two names of a kind, without numbers."""
    return ".".join([part for part in kind.split(".") if part != "*"][-2:])


def _without_common_end(names: Sequence[str]) -> list[str]:
    """Dotted names without the trailing parts that all of them share; their first part stays."""
    turned = [".".join(reversed(name.split("."))) for name in names]
    return [".".join(reversed(name.split("."))) for name in without_common_start(turned)]


def without_common_start(names: Sequence[str]) -> list[str]:
    """Dotted names without the leading parts that all of them share; their last part stays."""
    split = [name.split(".") for name in names]
    common = 0
    while split and all(len(parts) > common + 1 and parts[common] == split[0][common] for parts in split):
        common += 1
    return [".".join(parts[common:]) for parts in split]
