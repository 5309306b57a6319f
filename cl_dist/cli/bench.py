"""`cl-dist bench`: what the operations and the training step cost on this machine."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from functools import partial
from typing import Any

from cl_dist.benchmarks.command import BENCHMARKS, Benchmark

_DESCRIPTION = """\
Measure on this machine what the operations and the training step cost, against plain training, against the plain way
to do the same, and against what the hardware does at best. Contestants run in alternating rounds; what is told is the
median of the ratios within a round, with the smallest and the largest.
"""


def add_commands(commands: Any, common: ArgumentParser, changes: ArgumentParser) -> None:
    """Add `bench`; `commands` is argparse's collection of subparsers."""
    parser = commands.add_parser(
        "bench",
        help="measure the operations and the training step",
        description=_DESCRIPTION,
        formatter_class=RawDescriptionHelpFormatter,
    )
    benchmarks = parser.add_subparsers(title="benchmarks", required=True, metavar="BENCHMARK")
    for benchmark in BENCHMARKS.values():
        own = benchmarks.add_parser(benchmark.name, parents=[common], help=benchmark.summary)
        benchmark.add_to(own)
        own.set_defaults(command=partial(_bench, benchmark))


def _bench(benchmark: Benchmark, arguments: Namespace) -> int:
    print(benchmark.run(arguments))
    return 0
