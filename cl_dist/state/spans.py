"""Tensors of the training state by parameter name and position: any number of ranks and any ZeRO stage can read them.

At every ZeRO stage, a rank holds flat pieces of parameters. Each rank writes the spans [start, stop) that it holds of
each quantity ("master", "exp_avg", a method's own) of each parameter (row-major, flattened). A reader asks for the
spans that *it* needs, no matter which rank wrote them. For each rank, a folder contains:

- `rank-00000.safetensors`: the tensors, one per span, named `quantity/parameter@start`;
- `rank-00000.json`: an index of the spans, and the size and checksum of the tensor file; it has its own checksum.

With W ranks, W indexes say where everything is. If every rank read all of them, W² files would be opened, so each rank
reads its share, and the ranks tell each other what they found (`SpanIndex`; `state.snapshot` does the exchange).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from sys import intern
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from cl_dist.heartbeat import beat, opaque
from cl_dist.state.atomic import raising_disk_full, sync
from cl_dist.state.integrity import (
    CheckpointDamaged,
    file_sha256,
    patiently,
    read_sealed,
    require_format,
    write_sealed,
)

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Span:
    """A piece of a flattened parameter-shaped tensor."""

    start: int
    """Position of the first element in the flattened parameter."""
    data: torch.Tensor
    """(stop - start,), any dtype that safetensors supports, on any device."""

    def __post_init__(self) -> None:
        if self.data.dim() != 1 or self.start < 0:
            raise ValueError(f"a span is one-dimensional and starts at 0 or later, not {self.start}, {self.data.shape}")

    @property
    def stop(self) -> int:
        """Position after the last element."""
        return self.start + self.data.numel()


@dataclass(frozen=True)
class StoredSpan:
    """One entry of a rank's index: the elements [start, stop) of a parameter's quantity."""

    quantity: str
    parameter: str
    start: int
    stop: int
    dtype: str

    @property
    def key(self) -> str:
        """Name of the tensor in the rank's file."""
        return f"{self.quantity}/{self.parameter}@{self.start}"


def write_spans(folder: Path, rank: int, spans: Mapping[str, Mapping[str, Span]]) -> dict[str, Any]:
    """Write one rank's spans, `spans[quantity][parameter]`, to `folder`; both files are on disk on return.

    Spans may be views of one buffer, like ZeRO's, but must not overlap in memory. Returns the index as stored. Raises
    `ClDistError` if the disk is full, `ValueError` for a quantity with a `/`.
    """
    tensors: dict[str, torch.Tensor] = {}
    entries: list[dict[str, Any]] = []
    for quantity, by_parameter in spans.items():
        if "/" in quantity:
            raise ValueError(f"the name of a quantity must not contain '/': {quantity!r}")
        for parameter, span in by_parameter.items():
            dtype = str(span.data.dtype).removeprefix("torch.")
            stored = StoredSpan(quantity, parameter, span.start, span.stop, dtype)
            tensors[stored.key] = span.data.detach().cpu().contiguous()
            entries.append(asdict(stored))
    path = folder / f"{_stem(rank)}.safetensors"
    with raising_disk_full(path):
        with opaque():
            save_file(tensors, path)
        sync(path)
    index = {"format": FORMAT_VERSION, "bytes": path.stat().st_size, "sha256": file_sha256(path), "spans": entries}
    write_sealed(path.with_suffix(".json"), index)
    return index


def _stem(rank: int) -> str:
    """Name of a rank's two files without suffix."""
    return f"rank-{rank:05d}"


def _opened(path: Path) -> Any:
    """An open tensor file. Python opens it first, because safetensors reports every failure as a missing file."""
    with path.open("rb"):
        return safe_open(path, framework="pt")


class Part(NamedTuple):
    """One rank's index file, read and compared with its own checksum."""

    tensors: Path
    """The tensor file that it describes."""
    sha256: str
    """Checksum of the tensor file."""
    writer: int
    """The rank that wrote both."""
    spans: list[dict[str, Any]]
    """The fields of a `StoredSpan` each."""

    def verify(self) -> None:
        """Raise `CheckpointDamaged` if the tensor file is not what was written, `StateUnusable` if it is unreadable."""
        if patiently(self.tensors, partial(file_sha256, self.tensors)) != self.sha256:
            raise CheckpointDamaged(f"{self.tensors} is damaged: its content does not match its checksum")


def read_part(folder: Path, writer: int) -> Part:
    """Read the index that the rank `writer` wrote, and check the size of its tensor file.

    Raises `CheckpointDamaged` if a file is missing or has the wrong size, or the index is damaged; `StateUnusable` if
    one cannot be read or another release wrote it.
    """
    path = folder / f"{_stem(writer)}.json"
    index = read_sealed(path)
    require_format(path, index["format"], FORMAT_VERSION)
    tensors = path.with_suffix(".safetensors")
    if (size := patiently(tensors, tensors.stat).st_size) != index["bytes"]:
        raise CheckpointDamaged(f"{tensors} is damaged: {size} bytes where {index['bytes']} were written")
    beat()
    return Part(tensors, index["sha256"], writer, index["spans"])


def verified_share(folder: Path, writers: int, rank: int, world: int) -> list[Part]:
    """Read the indexes of every `world`-th writer, from `rank` on, and verify their tensor files; together the ranks
    read every file once. Raises as `read_part` and `Part.verify`.
    """
    parts = [read_part(folder, writer) for writer in range(rank, writers, world)]
    for part in parts:
        part.verify()
    return parts


class Place(NamedTuple):
    """The stored spans of one quantity of one parameter, in the order of their first elements."""

    starts: NDArray[np.int64]
    reach: NDArray[np.int64]
    """For each span, the furthest position after the last element of this one or an earlier one: spans may overlap."""
    sources: NDArray[np.int64]
    """(spans, 2): start and writer of the span that reaches that far."""
    dtypes: set[str]


class SpanIndex:
    """Where every stored span is, in few bytes: ranks send it to each other.

    Args:
        keys: Quantity, parameter and dtype, each combination once.
        rows: (spans, 4): position in `keys`, start, stop, and the rank that wrote the span.
    """

    def __init__(self, keys: list[tuple[str, str, str]], rows: NDArray[np.int64]) -> None:
        self._keys = keys
        self._rows = rows[np.lexsort((rows[:, 1], rows[:, 0]))]
        """Sorted by key, then by start."""

    @staticmethod
    def of(parts: Iterable[Part]) -> SpanIndex:
        """The index of the spans in some ranks' files."""
        numbers: dict[tuple[str, str, str], int] = {}
        rows: list[tuple[int, int, int, int]] = []
        for part in parts:
            for span in part.spans:
                # A word that is one object wherever it occurs is sent only once.
                key = (intern(span["quantity"]), intern(span["parameter"]), intern(span["dtype"]))
                rows.append((numbers.setdefault(key, len(numbers)), span["start"], span["stop"], part.writer))
        return SpanIndex(list(numbers), np.array(rows, np.int64).reshape(-1, 4))

    @staticmethod
    def merged(indexes: Iterable[SpanIndex]) -> SpanIndex:
        """One index of everything that is in `indexes`."""
        numbers: dict[tuple[str, str, str], int] = {}
        rows = [np.empty((0, 4), np.int64)]
        for index in indexes:
            # Each index numbers its own keys.
            renumbered = np.array([numbers.setdefault(key, len(numbers)) for key in index._keys], np.int64)
            rows.append(np.column_stack((renumbered[index._rows[:, 0]], index._rows[:, 1:])))
        return SpanIndex(list(numbers), np.concatenate(rows))

    def parameters(self, quantity: str) -> list[str]:
        """Names of the parameters that a quantity is stored for, sorted; empty if there is no such quantity."""
        return sorted({parameter for name, parameter, _ in self._keys if name == quantity})

    def place(self, quantity: str, parameter: str) -> Place:
        """The spans of a quantity of a parameter; none if it is not stored."""
        found = [(dtype, self._ranges[number]) for number, dtype in self._numbers.get((quantity, parameter), ())]
        rows = np.concatenate([self._rows[:0], *(self._rows[first:end] for _, (first, end) in found)])
        rows = rows[np.argsort(rows[:, 1], kind="stable")]
        reach = np.maximum.accumulate(rows[:, 2])
        furthest = np.maximum.accumulate(np.where(rows[:, 2] == reach, np.arange(len(rows)), 0))
        return Place(rows[:, 1], reach, rows[furthest][:, (1, 3)], {dtype for dtype, _ in found})

    @cached_property
    def _numbers(self) -> dict[tuple[str, str], list[tuple[int, str]]]:
        """The keys of each quantity and parameter: their number and dtype."""
        numbers: dict[tuple[str, str], list[tuple[int, str]]] = {}
        for number, (quantity, parameter, dtype) in enumerate(self._keys):
            numbers.setdefault((quantity, parameter), []).append((number, dtype))
        return numbers

    @cached_property
    def _ranges(self) -> list[tuple[int, int]]:
        """The first row of each key, and the one after its last."""
        return list(pairwise(np.searchsorted(self._rows[:, 0], np.arange(len(self._keys) + 1)).tolist()))


class SpanReader:
    """Reads any span from the files of all ranks in a folder, and only the bytes it needs.

    Args:
        folder: The folder.
        ranks: How many ranks wrote it; None: as many as have an index there.
        index: Where the spans are, if that is known already; otherwise all indexes are read.

    Raises:
        CheckpointDamaged: A file is missing or has the wrong size, or an index is damaged.
        StateUnusable: One cannot be read, or another release wrote it.
    """

    def __init__(self, folder: Path, ranks: int | None = None, index: SpanIndex | None = None) -> None:
        self.folder = folder
        self._handles: dict[int, Any] = {}
        self._parts: list[Part] = []
        if index is None:
            if ranks is None:
                ranks = len(list(folder.glob("rank-*.json")))
            if ranks == 0:
                raise CheckpointDamaged(
                    f"{folder} holds no rank-*.json: it is not a stored state, or an incomplete one"
                )
            self._parts = [read_part(folder, writer) for writer in range(ranks)]
        self._index = SpanIndex.of(self._parts) if index is None else index

    def verify(self, part: int = 0, parts: int = 1) -> None:
        """Verify the checksums of every `parts`-th file whose index this reader has read.

        Raises `CheckpointDamaged` for a file that differs, `StateUnusable` for one that cannot be read.
        """
        for one in self._parts[part::parts]:
            one.verify()

    def parameters(self, quantity: str) -> list[str]:
        """Names of the parameters that a quantity is stored for, sorted; empty if there is no such quantity."""
        return self._index.parameters(quantity)

    def read(self, quantity: str, parameter: str, start: int, stop: int) -> torch.Tensor:
        """The elements [start, stop) of a quantity of a parameter, (stop - start,) in the stored dtype, on the CPU.

        Raises `CheckpointDamaged` if they are not all stored or a file is not a tensor file, `StateUnusable` if one
        cannot be read.
        """
        place = self.require(quantity, parameter, start, stop)
        result = torch.empty(stop - start, dtype=getattr(torch, min(place.dtypes)))
        for first, last, origin, writer in self._pieces(place, quantity, parameter, start, stop):
            piece = self._slice(writer, f"{quantity}/{parameter}@{origin}", first - origin, last - origin)
            result[first - start : last - start] = piece
        return result

    def require(self, quantity: str, parameter: str, start: int, stop: int) -> Place:
        """Raise `CheckpointDamaged` unless all elements [start, stop) are stored in one dtype; reads no tensors.

        Returns the stored spans of the quantity.
        """
        place = self._index.place(quantity, parameter)
        if len(place.dtypes) != 1:
            problem = f"is stored as {', '.join(sorted(place.dtypes))}" if place.dtypes else "is not stored"
            raise CheckpointDamaged(f"{quantity} of {parameter} {problem} in {self.folder}")
        for _ in self._pieces(place, quantity, parameter, start, stop):
            pass
        return place

    def _pieces(
        self, place: Place, quantity: str, parameter: str, start: int, stop: int
    ) -> Iterator[tuple[int, int, int, int]]:
        """Cover [start, stop) with stored spans: first and last element to take, start of the span, its writer."""
        position = start
        while position < stop:
            number = int(np.searchsorted(place.starts, position, side="right")) - 1
            if number < 0 or place.reach[number] <= position:
                raise CheckpointDamaged(
                    f"{quantity} of {parameter}: no rank has stored element {position} in {self.folder}"
                )
            origin, writer = place.sources[number].tolist()
            end = int(place.reach[number])
            yield position, min(end, stop), origin, writer
            position = end

    def _slice(self, writer: int, key: str, first: int, last: int) -> torch.Tensor:
        """The elements [first, last) of one stored span."""
        path = self.folder / f"{_stem(writer)}.safetensors"
        try:
            if writer not in self._handles:
                self._handles[writer] = patiently(path, partial(_opened, path))
            return self._handles[writer].get_slice(key)[first:last]
        except SafetensorError as error:
            raise CheckpointDamaged(f"{path} is damaged: {error}") from error
