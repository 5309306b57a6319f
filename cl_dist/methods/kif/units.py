"""Skill units as data: which slices of which parameters are scored and fused together.

- `matrix` (TaSL): each trainable parameter is a unit; with LoRA, each lora_A and each lora_B. A parameter that holds
  one matrix per expert of a mixture has one unit per expert.
- `rank` (KIF): unit j of a LoRA module is row j of lora_A together with column j of lora_B. Other trained parameters
  (a classifier's head) form units as under `matrix`.
- `row`: each row of a parameter with two or more dimensions (an output feature of a linear layer, a token of an
  embedding). Weights that are stored transposed (GPT-2's Conv1D, GPT-OSS's experts) are also cut by output feature,
  and each expert has its own rows.

Nothing that is trained is left out: a parameter with one dimension, such as a bias or norm weight, is one unit (one per
expert, if it holds all experts'), under `row` too. Units depend only on names and shapes, in model order, so they are
the same for any number of ranks and any ZeRO stage.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from cl_dist.errors import BadInput
from cl_dist.kernels import RowLayout
from cl_dist.models.lora import LORA_A, LORA_B

Units = Literal["matrix", "rank", "row"]

CHUNK = 1 << 22
"""Elements whose units are looked up at a time: 32 MiB of indices."""


@dataclass(frozen=True)
class Part:
    """How one parameter is cut along some axes. Each slice belongs to a different unit."""

    first: int
    """Unit of the first slice; the next slices belong to the next units."""
    shape: tuple[int, ...]
    axes: tuple[int, ...]
    """Axes that are cut, ascending; in the numbering of slices the last one runs fastest. If empty, the whole parameter
    belongs to one unit."""

    @property
    def count(self) -> int:
        """Number of slices, hence of units that own one."""
        return math.prod(self.shape[axis] for axis in self.axes)

    @property
    def elements(self) -> int:
        """Elements of each slice."""
        return math.prod(self.shape) // self.count

    def slices(self, number: int) -> list[list[int]]:
        """Slice `number` as one [start, stop] per dimension."""
        whole = [[0, size] for size in self.shape]
        for axis in reversed(self.axes):
            number, place = divmod(number, self.shape[axis])
            whole[axis] = [place, place + 1]
        return whole

    def chunks(self, start: int, stop: int, device: torch.device) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield slice numbers of the flattened elements `[start, stop)`: offset from `start`, `(<= CHUNK,)` int64."""
        for position in range(start, stop, CHUNK):
            elements = torch.arange(position, min(position + CHUNK, stop), device=device)
            yield position - start, self.numbers(elements)

    def numbers(self, elements: torch.Tensor) -> torch.Tensor:
        """Slice numbers of elements of the flattened parameter, int64 in their shape."""
        numbers = torch.zeros_like(elements)
        for axis in self.axes:
            stride, size = math.prod(self.shape[axis + 1 :]), self.shape[axis]
            place = elements.div(stride, rounding_mode="floor").remainder_(size)
            numbers.mul_(size).add_(place)
        return numbers


@dataclass(frozen=True)
class UnitMap:
    """All units of a model."""

    names: tuple[str, ...]
    """Names of the units; a unit's number is its position here."""
    parts: Mapping[str, Part]
    """How each trainable parameter is cut, by name."""

    @staticmethod
    def build(
        shapes: Mapping[str, tuple[int, ...]], units: Units, layouts: Mapping[str, RowLayout] | None = None
    ) -> UnitMap:
        """Cut the trainable parameters into units.

        Args:
            shapes: Whole shapes by parameter name, in model order.
            units: What a unit is.
            layouts: Layouts of parameters whose rows are not along the first axis (`models.tracked.row_layouts`).

        Raises:
            BadInput: Units are ranks, and no parameters form a pair of LoRA matrices.
        """
        builder = _Builder(shapes, layouts or {})
        for name in shapes:
            builder.add(name, units)
        if units == "rank" and not builder.pairs:
            raise BadInput("method.units: rank is a rank of LoRA, and the model has none; give matrix or row")
        return UnitMap(tuple(builder.names), builder.parts)

    def __len__(self) -> int:
        """Number of units."""
        return len(self.names)

    def as_json(self) -> dict[str, list[dict[str, Any]]]:
        """Each unit's slices: unit -> [{"parameter": name, "slices": one [start, stop] per dimension}]."""
        units: dict[str, list[dict[str, Any]]] = {name: [] for name in self.names}
        for parameter, part in self.parts.items():
            for number in range(part.count):
                unit = self.names[part.first + number]
                units[unit].append({"parameter": parameter, "slices": part.slices(number)})
        return units

    def as_text(self) -> str:
        """`as_json` as text with one unit per line, since there can be a million."""
        lines = (f"{json.dumps(name)}: {json.dumps(slices)}" for name, slices in self.as_json().items())
        return "{\n" + ",\n".join(lines) + "\n}\n"


class _Builder:
    """Numbers the units in the order in which parameters are added."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], layouts: Mapping[str, RowLayout]) -> None:
        self._shapes, self._layouts = shapes, layouts
        self.names: list[str] = []
        self.parts: dict[str, Part] = {}
        self.pairs = 0

    def add(self, name: str, units: Units) -> None:
        if name in self.parts:  # already added, as the other half of a pair
            return
        pair = self._pair(name) if units == "rank" else None
        if pair is not None:
            self._add_pair(*pair)
        else:
            self._add(name, self._axes(name, rows=units == "row"))

    def _axes(self, name: str, rows: bool) -> tuple[int, ...]:
        """Axes along which a parameter is cut into rows; one that holds several experts is always cut by expert."""
        dimensions, layout = len(self._shapes[name]), self._layouts.get(name)
        if layout is None:
            return (0,) if rows and dimensions > 1 else ()
        if layout.length == 1 and dimensions == 2:  # a bias per expert
            return (0,)
        own = (dimensions - 1 if layout.columns else dimensions - 2,) if rows else ()
        return (0, *own) if dimensions == 3 else own

    def _add(self, name: str, axes: tuple[int, ...]) -> None:
        shape = self._shapes[name]
        self.parts[name] = Part(len(self.names), shape, axes)
        for places in itertools.product(*(range(shape[axis]) for axis in axes)):
            self.names.append(name + "".join(f"[{place}]" for place in places))

    def _add_pair(self, a: str, b: str) -> None:
        self.pairs += 1
        module, _, rest = a.partition(LORA_A)
        adapter = rest.removesuffix(".weight")
        for matrix, axis in ((b, 1), (a, 0)):
            self.parts[matrix] = Part(len(self.names), self._shapes[matrix], (axis,))
        self.names += [f"{module}.lora.{adapter}[{rank}]" for rank in range(self._shapes[a][0])]

    def _pair(self, name: str) -> tuple[str, str] | None:
        """Names of lora_A `(r, in)` and lora_B `(out, r)` if `name` belongs to such a pair."""
        a, b = name.replace(LORA_B, LORA_A), name.replace(LORA_A, LORA_B)
        if a == b or a not in self._shapes or b not in self._shapes:
            return None
        shape_a, shape_b = self._shapes[a], self._shapes[b]
        fits = len(shape_a) == len(shape_b) == 2 and shape_a[0] == shape_b[1]
        return (a, b) if fits else None


def add_sums_(sums: torch.Tensor, values: torch.Tensor, start: int, part: Part) -> None:
    """Add the values of consecutive elements of a flattened parameter to the sums of their slices.

    Args:
        sums: `(part.count,)` float64, added to in place.
        values: `(numel,)`, any floating dtype; added in float64.
        start: Position of the first element.
        part: How the parameter is cut.
    """
    if part.count == 1:
        sums += values.sum(dtype=sums.dtype)
        return
    for offset, slices in part.chunks(start, start + values.numel(), values.device):
        sums.index_add_(0, slices, values.narrow(0, offset, slices.numel()).to(sums.dtype))


def spread(values: torch.Tensor, part: Part, start: int, stop: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield each element's value in chunks: (offset from `start`, `(<= CHUNK,)`), for the elements `[start, stop)`.

    Args:
        values: `(part.count,)`, one per slice.
        part: How the parameter is cut.
        start: First element.
        stop: One past the last.
    """
    for offset, slices in part.chunks(start, stop, values.device):
        yield offset, values[slices]
