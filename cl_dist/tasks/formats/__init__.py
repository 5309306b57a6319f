"""One reader per data format; each turns a `Source` into a `RawTask` and reports unusable data as `BadInput`."""

from __future__ import annotations

from collections.abc import Callable

from cl_dist.tasks.formats import builtin, cl_benchmark, huggingface, jsonl, sgd, superni, tasl, text, trace
from cl_dist.tasks.formats.source import RawTask, Source

READERS: dict[str, Callable[[Source], RawTask]] = {
    "builtin": builtin.read,
    "cl_benchmark": cl_benchmark.read,
    "tasl": tasl.read,
    "trace": trace.read,
    "superni": superni.read,
    "sgd": sgd.read,
    "jsonl": jsonl.read,
    "text": text.read,
    "huggingface": huggingface.read,
}
"""Reader of each value of `stream.tasks[].format`."""
