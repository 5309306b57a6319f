"""Formats measurements as a table, a JSON document or a CSV file."""

from __future__ import annotations

import csv
import importlib
import json
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cl_dist.benchmarks.harness import Times
from cl_dist.benchmarks.limits import machine
from cl_dist.errors import BadInput

if TYPE_CHECKING:
    from cl_dist.benchmarks.command import Benchmark

Entry = dict[str, Any]
"""The measurements at one size as JSON values: sizes, "seconds" of every contestant, ratios."""
MISSING = "–"
"""Table cell without a number."""
HIDDEN_SETTINGS = ("json", "csv")


class Skipped(Exception):
    """This machine cannot run a benchmark; the message is a sentence that says why."""


@dataclass(frozen=True)
class Column:
    """One column of a benchmark's table."""

    title: str
    path: str
    """Dotted keys of an entry."""
    style: str = "text"
    """One of `_STYLES`."""

    def cell(self, entry: Entry) -> str:
        """The text of the table cell; `MISSING` if the value was not measured."""
        value: Any = entry
        for key in self.path.split("."):
            value = None if value is None else value.get(key)
        return MISSING if value is None else _STYLES[self.style](value)


def measured(benchmark: Benchmark, options: Namespace) -> str:
    """Measure every size and return the table or the JSON document; also write the CSV file if requested."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise BadInput("--device cuda: PyTorch finds no GPU here; use cpu")
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    module = importlib.import_module(benchmark.module)
    settings = {key: value for key, value in vars(options).items() if key not in HIDDEN_SETTINGS}
    try:
        with _threads(options.threads):
            about, entries = machine(device), list(module.entries(options, device))
    except Skipped as reason:
        nothing = {"benchmark": benchmark.name, "settings": settings, "skipped": str(reason)}
        return json.dumps(nothing, indent=2) if options.json else f"{benchmark.name}: skipped: {reason}"
    # The first size's keys are repeated at the top level, for scripts that measure a single size.
    document = {**entries[0], "benchmark": benchmark.name, "machine": about, "settings": settings, "sizes": entries}
    if options.csv is not None:
        write_csv(options.csv, document)
    return json.dumps(document, indent=2) if options.json else table(document, module.COLUMNS)


def timed(times: Times, pairs: Sequence[tuple[str, str]]) -> Entry:
    """The part of an entry that all benchmarks have in common: seconds, and `a_over_b` for each pair."""
    seconds = {name: times.spread(name).as_dict() for name in times.seconds}
    return {
        "runs": min(map(len, times.seconds.values())),
        "seconds": seconds,
        **{f"{above}_over_{below}": times.ratio(above, below).as_dict() for above, below in pairs},
    }


def table(document: Entry, columns: Sequence[Column]) -> str:
    """A heading, the machine, and a Markdown table with a line per size, without empty columns."""
    found = [[column.title, *(column.cell(entry) for entry in document["sizes"])] for column in columns]
    found = [cells for cells in found if set(cells[1:]) != {MISSING}]
    widths = [max(map(len, cells)) for cells in found]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in zip(*found, strict=True)]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    settings, about = _listed(document["settings"]), _listed(document["machine"])
    return "\n".join([f"{document['benchmark']}: {settings}", about, "", *lines])


def write_csv(path: Path, document: Entry) -> None:
    """Write one line per size, with nested keys joined by dots, and the machine on each line. Raises BadInput."""
    lines = [dict(flattened({**entry, "machine": document["machine"]})) for entry in document["sizes"]]
    names = list(dict.fromkeys(name for line in lines for name in line))
    try:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(lines)
    except OSError as error:
        raise BadInput(f"--csv {path}: cannot be written ({error.strerror}); give a writable file") from error


def flattened(entry: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """`{"a": {"b": 1}}` -> `("a.b", 1)`."""
    for key, value in entry.items():
        if isinstance(value, Mapping):
            yield from flattened(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _listed(values: Mapping[str, Any]) -> str:
    """`{"hidden": (64, 128), "runs": 3}` -> "hidden 64 128, runs 3"."""
    words = {name: " ".join(map(str, value)) if isinstance(value, tuple) else value for name, value in values.items()}
    return ", ".join(f"{name} {value}" for name, value in words.items() if value is not None)


@contextmanager
def _threads(wanted: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(wanted or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


_STYLES: dict[str, Callable[[Any], str]] = {
    "text": str,
    "number": lambda value: f"{value:.3g}",
    "scientific": lambda value: f"{value:.1e}",
    "bytes": lambda value: f"{value / 2**20:.0f} MiB",
    # Of a `Spread`.
    "milliseconds": lambda spread: f"{spread['median'] * 1e3:.4g}",
    "percent": lambda spread: f"{100 * spread['median']:.0f} %",
    "ratio": lambda spread: f"{spread['median']:.3g} ({spread['minimum']:.3g}–{spread['maximum']:.3g})",
}
