"""Tensors of the training state by parameter name and position: any number of ranks and any ZeRO stage can read them.

At every ZeRO stage, a rank holds flat pieces of parameters. Each rank writes the spans [start, stop) that it holds of
each quantity ("master", "exp_avg", a method's own) of each parameter (row-major, flattened). A reader asks for the
spans that *it* needs, no matter which rank wrote them. For each rank, a folder contains:

- `rank-00000.safetensors`: the tensors, one per span, named `quantity/parameter@start`;
- `rank-00000.json`: an index of the spans, and the size and checksum of the tensor file; it has its own checksum.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from cl_dist.heartbeat import opaque
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


class SpanReader:
    """Reads any span from the files of all ranks in a folder, and only the bytes it needs."""

    def __init__(self, folder: Path, ranks: int | None = None) -> None:
        """Read the indexes of all ranks; `ranks` is the expected number, if known.

        Raises `CheckpointDamaged` if a file is missing or has the wrong size, or an index is damaged; `StateUnusable`
        if one cannot be read or another release wrote it.
        """
        self.folder = folder
        if ranks is None:
            stems = sorted(path.stem for path in folder.glob("rank-*.json"))
        else:
            stems = [_stem(rank) for rank in range(ranks)]
        if not stems:
            raise CheckpointDamaged(f"{folder} holds no rank-*.json: it is not a stored state, or an incomplete one")
        self._sha256: dict[Path, str] = {}
        self._handles: dict[Path, Any] = {}
        self._stored: dict[tuple[str, str], list[tuple[StoredSpan, Path]]] = defaultdict(list)
        for stem in stems:
            self._add_index(folder / f"{stem}.json")

    def _add_index(self, path: Path) -> None:
        """Read one rank's index."""
        index = read_sealed(path)
        require_format(path, index["format"], FORMAT_VERSION)
        tensors = path.with_suffix(".safetensors")
        if (size := patiently(tensors, tensors.stat).st_size) != index["bytes"]:
            raise CheckpointDamaged(f"{tensors} is damaged: {size} bytes where {index['bytes']} were written")
        self._sha256[tensors] = index["sha256"]
        for entry in index["spans"]:
            stored = StoredSpan(**entry)
            self._stored[stored.quantity, stored.parameter].append((stored, tensors))

    def verify(self, part: int = 0, parts: int = 1) -> None:
        """Verify the files' checksums.

        To share the work, each rank passes its rank and the number of ranks, and reads every `parts`-th file. Raises
        `CheckpointDamaged` for a file that differs, `StateUnusable` for one that cannot be read.
        """
        for path in sorted(self._sha256)[part::parts]:
            if patiently(path, partial(file_sha256, path)) != self._sha256[path]:
                raise CheckpointDamaged(f"{path} is damaged: its content does not match its checksum")

    def parameters(self, quantity: str) -> list[str]:
        """Names of the parameters that a quantity is stored for, sorted; empty if there is no such quantity."""
        return sorted(parameter for name, parameter in self._stored if name == quantity)

    def read(self, quantity: str, parameter: str, start: int, stop: int) -> torch.Tensor:
        """The elements [start, stop) of a quantity of a parameter, (stop - start,) in the stored dtype, on the CPU.

        Raises `CheckpointDamaged` if they are not all stored or a file is not a tensor file, `StateUnusable` if one
        cannot be read.
        """
        stored = self.require(quantity, parameter, start, stop)
        result = torch.empty(stop - start, dtype=getattr(torch, stored[0][0].dtype))
        for span, path, first, last in self._pieces(quantity, parameter, start, stop):
            result[first - start : last - start] = self._slice(path, span, first, last)
        return result

    def require(self, quantity: str, parameter: str, start: int, stop: int) -> Sequence[tuple[StoredSpan, Path]]:
        """Raise `CheckpointDamaged` unless all elements [start, stop) are stored in one dtype; reads no tensors.

        Returns the stored spans of the quantity, with their files.
        """
        stored = self._stored.get((quantity, parameter), [])
        dtypes = {span.dtype for span, _ in stored}
        if len(dtypes) != 1:
            problem = f"is stored as {', '.join(sorted(dtypes))}" if dtypes else "is not stored"
            raise CheckpointDamaged(f"{quantity} of {parameter} {problem} in {self.folder}")
        for _ in self._pieces(quantity, parameter, start, stop):
            pass
        return stored

    def _pieces(
        self, quantity: str, parameter: str, start: int, stop: int
    ) -> Iterator[tuple[StoredSpan, Path, int, int]]:
        """Stored spans that together cover [start, stop): span, file, first and last element to take from it."""
        stored, position = self._stored[quantity, parameter], start
        while position < stop:
            span, path = self._covering(stored, position, f"{quantity} of {parameter}")
            yield span, path, position, min(span.stop, stop)
            position = span.stop

    def _covering(self, stored: Sequence[tuple[StoredSpan, Path]], position: int, what: str) -> tuple[StoredSpan, Path]:
        """The span that contains `position` and extends furthest beyond it."""
        candidates = [entry for entry in stored if entry[0].start <= position < entry[0].stop]
        if not candidates:
            raise CheckpointDamaged(f"{what}: no rank has stored element {position} in {self.folder}")
        return max(candidates, key=lambda entry: entry[0].stop)

    def _slice(self, path: Path, span: StoredSpan, start: int, stop: int) -> torch.Tensor:
        """The elements [start, stop) of the parameter, from one stored span."""
        try:
            if path not in self._handles:
                self._handles[path] = patiently(path, partial(_opened, path))
            return self._handles[path].get_slice(span.key)[start - span.start : stop - span.start]
        except SafetensorError as error:
            raise CheckpointDamaged(f"{path} is damaged: {error}") from error
