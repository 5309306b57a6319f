#!/usr/bin/env python3
"""What grows with the number of ranks besides training: the resume of one rank, and the watchdog's files.

    python -m cl_dist.benchmarks.growth.ranks [--ranks 1 4 16 64 256 1024] [--keep FOLDER] [--write]

Resume: seconds, bytes and files opened on one rank. One process simulates the saved states of a Llama-2-7B run under
ZeRO-3 with KIF, where every rank holds a piece of each of the 291 parameters in six quantities. There are as many spans
as in a real state, with the same names, but each holds only two elements. As many ranks resume as have written. In the
rows "all", each rank reads the index of every rank. In the rows "share", each rank reads its share of the indexes;
rank 0 merges what all have read, and sends it to everyone. The rows are those of rank 0, which has the most to do.
Network time is left out; `exchanged` has the bytes that rank 0 receives and sends to one rank. The rows "before" in the
stored results come from the code before each rank read only its share, on the same states.

Watchdog: the files that all ranks together open in one check while all wait, once one of them is on duty. In the rows
"before", each rank read the pulses of all others; that number is computed.

With --write, the rows replace those of the same way and number of ranks in benchmarks/results/growth-ranks.csv, and all
of them make the picture docs/results/growth-ranks.png.
"""

from __future__ import annotations

import argparse
import csv
import pickle
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from cl_dist.benchmarks.growth.curves import PICTURES, RESULTS
from cl_dist.report.drawing import BLUE, ORANGE, draw
from cl_dist.state.spans import Span, SpanIndex, SpanReader, verified_share, write_spans
from cl_dist.watchdog.peers import Lookout, Pulse, PulseFiles

NAME = "growth-ranks"
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
COLUMNS = ("what", "ranks", "way", "seconds", "index_files", "files_opened", "bytes_read", "exchanged")

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
    """One row for each way."""

    def all_indexes() -> None:
        reader = SpanReader(folder, ranks)
        reader.verify(0, ranks)
        read_own(reader, 0)

    yield {"what": "resume", "ranks": ranks, "way": "all", **usage.of(all_indexes, folder), "exchanged": 0}
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
    yield {"what": "resume", "ranks": ranks, "way": "share", **row, "exchanged": sum(map(len, others)) + sent[0]}


def watch(folder: Path, ranks: int, usage: Usage) -> Iterator[Row]:
    """The files that a check of the watchdogs opens."""
    files = PulseFiles(folder, ranks)
    lookouts = [Lookout(files, rank) for rank in range(ranks)]

    def check() -> None:
        for rank, lookout in enumerate(lookouts):
            files.write(rank, Pulse(1, 600.0, "waiting", waiting=True))
            lookout.check(0.0, 60.0)

    while sum(lookout.on_duty for lookout in lookouts) != 1:
        check()
    found = usage.of(check, folder)
    yield {"what": "watchdog", "ranks": ranks, "way": "before", "files_opened": ranks + ranks * (ranks - 1)}
    yield {"what": "watchdog", "ranks": ranks, "way": "one on duty", "files_opened": found["files_opened"]}


def publish(rows: Sequence[Row], folders: tuple[Path, Path] = (RESULTS, PICTURES)) -> None:
    """Write a CSV file and a picture. Rows that are already in the file stay if none of the new ones replaces them."""
    results, picture = folders[0] / f"{NAME}.csv", folders[1] / f"{NAME}.png"
    before = read(results) if results.exists() else []
    merged = {(row["what"], int(row["ranks"]), row["way"]): row for row in (*before, *rows)}
    with results.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(merged[key] for key in sorted(merged))
    picture.write_bytes(draw_rows(read(results)))


def read(results: Path) -> list[Row]:
    """The rows of a CSV file, as text."""
    with results.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def draw_rows(rows: Sequence[Row]) -> bytes:
    """The picture: seconds of a resume, its bytes, and the watchdog's files, each against the ranks."""
    panels = (
        ("resume", "seconds", "seconds of rank 0 on resume"),
        ("resume", "bytes_read", "bytes that rank 0 reads on resume"),
        ("watchdog", "files_opened", "files opened in a check, all ranks"),
    )
    colours = {"before": ORANGE, "share": BLUE, "one on duty": BLUE}
    labels = {"before": "before: every rank reads all", "share": "each reads its share", "one on duty": "one reads all"}

    def paint(figure: Any) -> None:
        for axes, (what, column, title) in zip(figure.subplots(1, len(panels)), panels, strict=True):
            for way, colour in colours.items():
                found = [row for row in rows if (row["what"], row["way"]) == (what, way)]
                if found:
                    places = [int(row["ranks"]) for row in found], [float(row[column]) for row in found]
                    axes.plot(*places, marker="o", color=colour, label=labels[way])
            axes.set(xscale="log", yscale="log", xlabel="ranks", title=title)
            axes.xaxis.set_major_formatter("{x:.0f}")
            if axes.lines:
                axes.legend(frameon=False, fontsize=8)

    return draw((12.0, 3.6), paint).render()["png"]


def main() -> None:
    """Measure, and print every row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 4, 16, 64, 256, 1024])
    parser.add_argument("--keep", type=Path, help="folder for the states, which are used again if they are there")
    parser.add_argument("--write", action="store_true", help="update the CSV file and the picture")
    options = parser.parse_args()
    usage, rows = Usage(), []
    with tempfile.TemporaryDirectory() as temporary:
        for ranks in options.ranks:
            folder = (options.keep or Path(temporary)) / f"{ranks}-ranks"
            if not folder.exists():
                folder.mkdir(parents=True)
                write_state(folder, ranks)
            pulses = Path(temporary) / f"{ranks}-pulses"
            pulses.mkdir()
            for row in (*measure(folder, ranks, usage), *watch(pulses, ranks, usage)):
                rows.append(row)
                print(row, flush=True)
    if options.write:
        publish(rows)


if __name__ == "__main__":
    main()
