"""Tokenised samples as flat arrays: a few bytes a token, where Python lists take 44.

A `Table` is one split of one task, in memory or mapped from a file (`cl_dist.state.token_cache`). `Samples` is any
selection from tables, in any order, which costs 12 bytes a sample: a task's training data together with replayed
samples of other tasks copies no tokens. A sample becomes an `Encoded` when it is looked up. Imports no torch.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from cl_dist.tasks.types import IGNORE, Encoded

Integers = npt.NDArray[np.integer[Any]]

_SHORT = 1 << 16
"""Ids below this are stored in two bytes."""
_OFTEN = 1000
"""Samples between two calls of `pack`'s `alive`."""


def nothing() -> None:
    """Do nothing."""


def table_bytes(samples: int, ids: int, labels: int, *, vocabulary: int) -> int:
    """Bytes of a `Table`, to plan with.

    Args:
        samples: Number of samples.
        ids: Tokens of all samples.
        labels: Labels of all samples that are not a stretch of their own ids.
        vocabulary: Number of the ids that there can be.
    """
    wide = 2 if vocabulary <= _SHORT else 4
    # Starts, index and targets; and either the two ends of a stretch, or a start of labels: 8 bytes in both cases.
    return wide * (ids + labels) + samples * (8 + 4 + 4 + 8)


SELECTION_BYTES = 12
"""Of `Samples`, for each sample."""


@dataclass(frozen=True)
class Table:
    """N encoded samples with T tokens, in file order.

    The labels of a decoder or a masked language model repeat a stretch of the sample's own ids, so `spans` has just its
    two ends. Otherwise (an encoder-decoder's answers, classes) `labels` has them, and `spans` is empty.
    """

    ids: Integers
    """(T,), uint16 or uint32."""
    starts: Integers
    """(N + 1,), int64: where each sample's ids begin and end."""
    spans: Integers
    """(N, 2) int32, relative to a sample's first token, or (0, 2)."""
    labels: Integers
    """int32 or uint16; empty if `spans` is not."""
    label_starts: Integers
    """(N + 1,) int64, or empty if `spans` is not."""
    index: Integers
    """(N,) int32: `Encoded.index`."""
    targets: Integers
    """(N,) int32: `Encoded.targets`."""

    def sample(self, row: int) -> Encoded:
        """Sample `row` as Python lists."""
        ids = self.ids[self.starts[row] : self.starts[row + 1]].tolist()
        if len(self.spans):
            start, end = self.spans[row].tolist()
            labels = [IGNORE] * start + ids[start:end] + [IGNORE] * (len(ids) - end)
        else:
            labels = self.labels[self.label_starts[row] : self.label_starts[row + 1]].tolist()
        return Encoded(int(self.index[row]), ids, labels)

    @property
    def lengths(self) -> Integers:
        """(N,) int64: each sample's number of input tokens."""
        return np.diff(self.starts)

    @property
    def label_lengths(self) -> Integers:
        """(N,) int64: each sample's number of labels."""
        return self.lengths if len(self.spans) else np.diff(self.label_starts)

    @property
    def nbytes(self) -> int:
        """Size of all arrays in bytes."""
        return sum(getattr(self, field.name).nbytes for field in fields(self))


class Samples(Sequence[Encoded]):
    """Samples by their rows in tables.

    Args:
        tables: Where the samples are.
        which: (N,) integers: the position in `tables` of each sample's table.
        rows: (N,) integers: each sample's row there.
    """

    def __init__(self, tables: Sequence[Table], which: Integers, rows: Integers) -> None:
        self._tables, self._which, self._rows = tuple(tables), which.astype(np.int32), rows.astype(np.int64)

    def __len__(self) -> int:
        """Number of samples."""
        return len(self._rows)

    @overload
    def __getitem__(self, place: int) -> Encoded: ...
    @overload
    def __getitem__(self, place: slice) -> Samples: ...
    def __getitem__(self, place: int | slice) -> Encoded | Samples:
        """One sample, or the samples of a slice."""
        if isinstance(place, slice):
            return Samples(self._tables, self._which[place], self._rows[place])
        return self._tables[self._which[place]].sample(int(self._rows[place]))

    def __eq__(self, other: object) -> bool:
        """Whether the other sequence has the same samples in the same order."""
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(own == theirs for own, theirs in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]  # compared by content, as a list is

    def pick(self, places: Sequence[int]) -> Samples:
        """The samples at these places, in this order."""
        chosen = np.asarray(places, dtype=np.int64)
        return Samples(self._tables, self._which[chosen], self._rows[chosen])

    @cached_property
    def lengths(self) -> Integers:
        """(N,) int64: input tokens."""
        return self._column(lambda table: table.lengths)

    @cached_property
    def label_lengths(self) -> Integers:
        """(N,) int64: labels."""
        return self._column(lambda table: table.label_lengths)

    @cached_property
    def targets(self) -> Integers:
        """(N,) int64: positions that take part in the loss."""
        return self._column(lambda table: table.targets)

    def _column(self, read: Callable[[Table], Integers]) -> Integers:
        column = np.zeros(len(self), dtype=np.int64)
        for number, table in enumerate(self._tables):
            here = self._which == number
            column[here] = read(table)[self._rows[here]]
        return column


def whole(table: Table) -> Samples:
    """All samples of a table, in order."""
    count = len(table.index)
    return Samples([table], np.zeros(count, dtype=np.int32), np.arange(count))


def as_samples(samples: Sequence[Encoded]) -> Samples:
    """Any sequence of encoded samples as `Samples`; what is not in tables yet is packed into one."""
    return samples if isinstance(samples, Samples) else whole(pack(samples))


def join(parts: Iterable[Sequence[Encoded]]) -> Samples:
    """The samples of all parts, one part after the other."""
    tables: list[Table] = []
    which, rows = [np.zeros(0, dtype=np.int32)], [np.zeros(0, dtype=np.int64)]
    for part in map(as_samples, parts):
        which.append(part._which + np.int32(len(tables)))
        rows.append(part._rows)
        tables += part._tables
    return Samples(tables, np.concatenate(which), np.concatenate(rows))


def pack(samples: Iterable[Encoded], alive: Callable[[], None] = nothing) -> Table:
    """Store samples in arrays. Takes them one at a time, so that an iterator's samples are never in memory together.

    `alive` is called every now and then.
    """
    packer = _Packer()
    for number, sample in enumerate(samples):
        packer.add(sample)
        if number % _OFTEN == 0:
            alive()
    return packer.table()


class _Packer:
    """Collects samples in arrays that grow."""

    def __init__(self) -> None:
        self._ids, self._starts = array("I"), array("q", [0])
        self._spans, self._index, self._targets = array("i"), array("i"), array("i")
        self._labels, self._label_starts = array("i"), array("q", [0])
        self._inside = True
        """Whether every sample's labels so far are a stretch of its ids."""

    def add(self, sample: Encoded) -> None:
        """Append a sample."""
        span = _span(sample) if self._inside else None
        if span is None and self._inside:
            self._write_labels_out()
        self._ids.extend(sample.input_ids)
        self._starts.append(len(self._ids))
        self._index.append(sample.index)
        self._targets.append(sample.targets)
        if span is not None:
            self._spans.extend(span)
        else:
            self._labels.extend(sample.labels)
            self._label_starts.append(len(self._labels))

    def table(self) -> Table:
        """Everything that was added."""
        labels = np.array(self._labels, dtype=np.int32)
        return Table(
            ids=_narrow(np.array(self._ids, dtype=np.uint32)),
            starts=np.array(self._starts, dtype=np.int64),
            spans=np.array(self._spans, dtype=np.int32).reshape(-1, 2),
            labels=labels if labels.min(initial=0) < 0 else _narrow(labels),
            label_starts=np.array([] if self._inside else self._label_starts, dtype=np.int64),
            index=np.array(self._index, dtype=np.int32),
            targets=np.array(self._targets, dtype=np.int32),
        )

    def _write_labels_out(self) -> None:
        """Turn the stretches so far into labels: this sample's labels are something else."""
        self._inside = False
        for row, (first, last) in enumerate(zip(self._starts, self._starts[1:], strict=False)):
            start, end = self._spans[2 * row : 2 * row + 2]
            ids = self._ids[first:last].tolist()
            self._labels.extend([IGNORE] * start + ids[start:end] + [IGNORE] * (len(ids) - end))
            self._label_starts.append(len(self._labels))
        self._spans = array("i")


def _span(sample: Encoded) -> tuple[int, int] | None:
    """The ends of the only stretch of positions with a label, if the labels there are the ids; otherwise None."""
    ids, labels = sample.input_ids, sample.labels
    if len(labels) != len(ids):
        return None
    ignored = labels.count(IGNORE)
    count = len(labels) - ignored
    # Mostly the prompt is ignored and the answer is not.
    start = ignored
    if labels[start:] != ids[start:]:
        start = next(place for place, label in enumerate(labels) if label != IGNORE)
        if labels[start : start + count] != ids[start : start + count]:
            return None
    return start, start + count


def _narrow(values: Integers) -> Integers:
    """The values in two bytes each, if they fit."""
    return values.astype(np.uint16) if values.max(initial=0) < _SHORT else values
