#!/usr/bin/env python3
r"""What one rank does on resume, for states that 1 to 1,024 ranks have written: seconds, bytes and files opened.

Usage:
    python benchmarks/resume_ranks.py [--ranks 1 4 16 64 256 1024] [--csv FILE] [--keep FOLDER]

The states are simulated by one process: those of a run of Llama-2-7B under ZeRO-3 with KIF, where every rank holds a
piece of each of the 291 parameters in six quantities. The spans are as many as in a real state, and as long by name,
but hold two elements each. As many ranks resume as have written.

Two ways are measured. "all": each rank reads the index of every rank. "share": each rank reads its share of the
indexes, rank 0 merges what all have read, and sends it to everyone. The line is that of rank 0, which has most to do.
What the network takes is left out; `exchanged` has the bytes that rank 0 receives and sends to one rank.
"""

from __future__ import annotations

import argparse
import csv
import pickle
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from cl_dist.state.spans import Span, SpanIndex, SpanReader, verified_share, write_spans

QUANTITIES = ("master", "exp_avg", "exp_avg_sq", "smoothed", "uncertainty", "fused")
ELEMENTS = 2
"""Elements of a span."""
PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
PARTS = (*PROJECTIONS, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm")
NAMES = (
    "model.embed_tokens.weight",
    *(f"model.layers.{layer}.{part}.weight" for layer in range(32) for part in PARTS),
    "model.norm.weight",
    "lm_head.weight",
)
"""The parameters of Llama-2-7B."""
COLUMNS = ("ranks", "way", "seconds", "index_files", "files_opened", "bytes_read", "exchanged")

Row = dict[str, Any]


def write_state(folder: Path, ranks: int) -> None:
    """Write a state as `ranks` ranks would leave it, all from this process."""
    for rank in range(ranks):
        values = torch.full((len(QUANTITIES), len(NAMES), ELEMENTS), float(rank))
        spans = {
            quantity: {name: Span(ELEMENTS * rank, own) for name, own in zip(NAMES, rows, strict=True)}
            for quantity, rows in zip(QUANTITIES, values, strict=True)
        }
        write_spans(folder, rank, spans)


class Usage:
    """Files that Python opens and bytes that this process reads, below a folder.

    An audit hook cannot be removed, so there is one for all measurements.
    """

    def __init__(self) -> None:
        self.opened: list[str] = []
        self._folder: str | None = None
        sys.addaudithook(self._note)

    def _note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and self._folder is not None and str(arguments[0]).startswith(self._folder):
            self.opened.append(str(arguments[0]))

    def of(self, work: Callable[[], object], folder: Path) -> Row:
        """What `work` takes."""
        self.opened, self._folder = [], str(folder)
        before, began = _bytes_read(), time.perf_counter()
        work()
        seconds, self._folder = time.perf_counter() - began, None
        return {
            "seconds": round(seconds, 3),
            "index_files": sum(name.endswith(".json") for name in self.opened),
            "files_opened": len(self.opened),
            "bytes_read": _bytes_read() - before,
        }


def _bytes_read() -> int:
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"])


def read_own(reader: SpanReader, rank: int) -> None:
    """Check and read the tensors of a rank."""
    start, stop = ELEMENTS * rank, ELEMENTS * (rank + 1)
    for quantity in QUANTITIES:
        for name in NAMES:
            reader.require(quantity, name, start, stop)
    for quantity in QUANTITIES:
        for name in NAMES:
            assert reader.read(quantity, name, start, stop).eq(rank).all()


def measure(folder: Path, ranks: int, usage: Usage) -> Iterator[Row]:
    """One line for each way."""

    def all_indexes() -> None:
        reader = SpanReader(folder, ranks)
        reader.verify(0, ranks)
        read_own(reader, 0)

    yield {"ranks": ranks, "way": "all", **usage.of(all_indexes, folder), "exchanged": 0}
    # What the other ranks do at the same time is prepared outside of the measurement.
    others = [pickle.dumps(SpanIndex.of(verified_share(folder, ranks, rank, ranks))) for rank in range(1, ranks)]
    sent = [0]

    def share() -> None:
        own = SpanIndex.of(verified_share(folder, ranks, 0, ranks))
        received = [pickle.loads(message) for message in others]  # noqa: S301
        message = pickle.dumps(SpanIndex.merged([own, *received]))
        sent[0] = len(message)
        read_own(SpanReader(folder, index=pickle.loads(message)), 0)  # noqa: S301

    row = usage.of(share, folder)
    yield {"ranks": ranks, "way": "share", **row, "exchanged": sum(map(len, others)) + sent[0]}


def main() -> None:
    """Measure, print a table, and write it as CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 4, 16, 64, 256, 1024])
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--keep", type=Path, help="folder for the states, which are used again if they are there")
    options = parser.parse_args()
    usage, rows = Usage(), []
    with tempfile.TemporaryDirectory() as temporary:
        for ranks in options.ranks:
            folder = (options.keep or Path(temporary)) / f"{ranks}-ranks"
            if not folder.exists():
                folder.mkdir(parents=True)
                write_state(folder, ranks)
            for row in measure(folder, ranks, usage):
                rows.append(row)
                print(row, flush=True)
    if options.csv is not None:
        with options.csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
