#!/usr/bin/env python3
"""How a training step, and what MIGU and KIF add to it, grow with the width of the model. On a CPU.

    python -m cl_dist.benchmarks.growth.width [--hidden 256 512 1024 2048] [--tokens 256] [--runs 9] [--write]

Whole optimiser steps of one block of a Llama with random weights, under DeepSpeed ZeRO-2 on one rank. All methods step
on the same batch, in alternating rounds; a ratio is taken within a round. With --write, the rows replace those for the
same widths in benchmarks/results/growth-width.csv, and all of them make the picture docs/results/growth-width.png.
"""

from __future__ import annotations

import argparse
import gc
import math
from collections.abc import Sequence

from cl_dist.benchmarks.engine_steps import METHODS, race_methods
from cl_dist.benchmarks.growth import curves
from cl_dist.benchmarks.growth.curves import Panel
from cl_dist.benchmarks.harness import Spread, Times
from cl_dist.benchmarks.shapes import model_of
from cl_dist.benchmarks.training import StepSize

NAME = "growth-width"
SEQUENTIAL, *ADDED = METHODS
LABELS = {"dense": "sequential", "migu": "MIGU", "unskipped": "MIGU, all rows computed", "kif": "KIF"}
PANELS = (
    Panel("One training step (CPU)", "ms", {f"{name}, ms": LABELS[name] for name in METHODS}),
    Panel(
        "Compared with sequential training",
        "time of a step / sequential",
        {f"{name} / dense": LABELS[name] for name in ADDED},
        linear=True,
        spread=True,
    ),
)


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, nargs="+", default=[256, 512, 1024, 2048])
    parser.add_argument("--tokens", type=int, default=256, help="tokens per step")
    parser.add_argument("--runs", type=int, default=9, help="rounds; each runs every method")
    parser.add_argument("--write", action="store_true", help="replace the CSV file and the picture")
    options = parser.parse_args()
    rows = [measure(hidden, options.tokens, options.runs) for hidden in options.hidden]
    print(curves.table(rows))
    for name in METHODS:
        print(f"{LABELS[name]}: time grows like width^{exponent(rows, f'{name}, ms'):.2f}")
    if options.write:
        curves.publish(NAME, rows, "hidden", PANELS)


def measure(hidden: int, tokens: int, runs: int) -> dict[str, float]:
    """One row: milliseconds of a step by method, the ratios to the sequential step, and what each method adds."""
    widths = model_of(hidden, blocks=1)
    size = StepSize(hidden, widths.intermediate, widths.heads, widths.key_value_heads, 1, tokens, 0.7)
    times = race_methods(size, 2, runs)
    gc.collect()
    row: dict[str, float] = {"hidden": hidden, "tokens": tokens}
    row |= {f"{name}, ms": 1e3 * times.spread(name).median for name in METHODS}
    for name in ADDED:
        ratio = times.ratio(name, SEQUENTIAL)
        row[f"{name} / dense"] = ratio.median
        row |= {f"{name} / dense, least": ratio.minimum, f"{name} / dense, most": ratio.maximum}
        row[f"{name} adds, ms"] = 1e3 * added(times, name).median
    return row


def added(times: Times, name: str) -> Spread:
    """Seconds that a method's step takes longer than the sequential one of the same round."""
    pairs = zip(times.seconds[name], times.seconds[SEQUENTIAL], strict=True)
    return Spread.of([mine - other for mine, other in pairs])


def exponent(rows: Sequence[curves.Row], column: str, over: str = "hidden") -> float:
    """The slope of a column over another on logarithmic scales between the first and the last row."""
    first, last = rows[0], rows[-1]
    return math.log(last[column] / first[column]) / math.log(last[over] / first[over])


if __name__ == "__main__":
    main()
