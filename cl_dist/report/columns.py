"""Maps thousands of skill units to the columns of one picture.

A few units get a column each. More units are averaged, weighted by their number of elements: then a column is one
module of one layer, and modules of the same kind (`self_attn.q_proj`) are adjacent, with layers from left to right. A
large model has a few hundred of these columns, which still fit into a picture.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from cl_dist.report.units import Indices, UnitTable

MAX_UNITS = 128
"""More units than this are averaged."""
MAX_BLOCKS = 32
"""Units of more modules than this are averaged too, since the labels of the modules would overlap."""
MAX_NAMED = 64
"""With more columns than this, modules outside the layers share one label, since there is no room for their names."""
OUTSIDE = "outside the layers"

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


@dataclass(frozen=True)
class Columns:
    """The columns of a picture, grouped into labelled blocks."""

    what: str
    """What the columns are, for the label of the axis."""
    blocks: tuple[tuple[str, int], ...]
    """Label and number of columns of each block, from left to right."""
    of_piece: Indices
    """`(pieces,)` the column of each piece (see `UnitTable`)."""

    @property
    def count(self) -> int:
        """Number of columns."""
        return sum(width for _, width in self.blocks)


@dataclass(frozen=True)
class _Place:
    """The position of a module: `model.layers.3.mlp.up_proj` is layer 3 of the kind (`model.layers`, `mlp.up_proj`)."""

    kind: tuple[str, str]
    """The stack of layers and the module's name within a layer; for a module outside the layers an empty stack."""
    layer: int
    """-1: outside the layers."""


def columns_of_units(table: UnitTable) -> Columns:
    """A column per unit and a block per module if there are few units; otherwise `columns_of_modules`."""
    few = len(table.names) <= MAX_UNITS and len(table.modules) <= MAX_BLOCKS
    if not few or len(table.unit) > len(table.names) or len(table.names) == len(table.modules):
        return columns_of_modules(table)
    # Invert the permutation that sorts the pieces by module: piece -> column.
    order = np.argsort(table.module, kind="stable")
    of_piece = np.empty_like(order)
    of_piece[order] = np.arange(len(order))
    widths = np.bincount(table.module).tolist()
    return Columns("skill units, by module", tuple(zip(_module_labels(table.modules), widths, strict=True)), of_piece)


def columns_of_modules(table: UnitTable) -> Columns:
    """A column per layer and kind of module, and a block per kind; modules outside the layers come last.

    Modules of one layer whose names differ only in numbers (experts) share a column.
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
    """Label and width of each block. Modules outside the layers get a block each if there is room for their names."""
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
    """The position of a module; the first number in its name is the layer."""
    parts = module.split(".")
    at = next((index for index, part in enumerate(parts) if part.isdigit()), None)
    if at is None:
        return _Place(("", module), -1)
    return _Place((".".join(parts[:at]), _NUMBER.sub("*", ".".join(parts[at + 1 :]))), int(parts[at]))


def _labels(kinds: Sequence[tuple[str, str]]) -> dict[tuple[str, str], tuple[str, str]]:
    """Short names for each kind: one for its stack (`encoder`; empty if there is only one), one for the module
    (`SelfAttention.q`).
    """
    short = {(stack, kind): _tail(kind) or stack for stack, kind in kinds}
    # If two kinds of one stack would get the same label, use whole names.
    if len({(stack, tail) for (stack, _), tail in short.items()}) < len(kinds):
        short = {(stack, kind): kind or stack for stack, kind in kinds}
    stacks = list(dict.fromkeys(stack for stack, _ in kinds))
    names = _without_common_end(without_common_start(stacks)) if len(stacks) > 1 else [""] * len(stacks)
    of_stack = dict(zip(stacks, names, strict=True))
    return {(stack, kind): (of_stack[stack], short[stack, kind]) for stack, kind in kinds}


def _module_labels(modules: Sequence[str]) -> list[str]:
    """Short labels of single modules (`0 self_attn.q_proj`), or full names if the short ones would be ambiguous."""
    places = [_place(module) for module in modules]
    labels = _labels(list(dict.fromkeys(place.kind for place in places if place.layer >= 0)))
    short = []
    for place in places:
        stack, kind = labels.get(place.kind, ("", ""))
        short.append(place.kind[1] if place.layer < 0 else f"{stack} {place.layer} {kind}".strip())
    return short if len(set(short)) == len(short) else without_common_start(modules)


def _tail(kind: str) -> str:
    """The last two parts of a module's name, without numbers."""
    return ".".join([part for part in kind.split(".") if part != "*"][-2:])


def _without_common_end(names: Sequence[str]) -> list[str]:
    """Dotted names without their common trailing parts; the first part of each always stays."""
    turned = [".".join(reversed(name.split("."))) for name in names]
    return [".".join(reversed(name.split("."))) for name in without_common_start(turned)]


def without_common_start(names: Sequence[str]) -> list[str]:
    """Dotted names without their common leading parts; the last part of each always stays."""
    split = [name.split(".") for name in names]
    common = 0
    while split and all(len(parts) > common + 1 and parts[common] == split[0][common] for parts in split):
        common += 1
    return [".".join(parts[common:]) for parts in split]
