"""`cl-dist bench`: the cost of the operations and of the training step on this machine."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from functools import partial
from typing import Any

from cl_dist.benchmarks.command import BENCHMARKS, Benchmark
from cl_dist.benchmarks.gpu import day
from cl_dist.cli.parser import Help
from cl_dist.progress import waiting

_DESCRIPTION = """\
Measure the cost of the operations and of the training step on this machine, compared with plain training, with a plain
implementation, and with the limits of the hardware. All variants run in alternating rounds; the result is the median of
the ratios within a round, with the minimum and the maximum.
"""


def add_commands(commands: Any, common: ArgumentParser, changes: ArgumentParser) -> None:
    """Add `bench`; `commands` is argparse's collection of subparsers."""
    parser = commands.add_parser(
        "bench",
        description=_DESCRIPTION,
        formatter_class=Help,
    )
    benchmarks = parser.add_subparsers(title="benchmarks", required=True, metavar="BENCHMARK")
    for benchmark in BENCHMARKS.values():
        own = benchmarks.add_parser(benchmark.name, parents=[common], help=benchmark.summary)
        benchmark.add_to(own)
        own.formatter_class = Help
        own.set_defaults(command=partial(_bench, benchmark))
    gpu = benchmarks.add_parser("gpu", parents=[common], help="everything that only a GPU can show, in one command")
    gpu.formatter_class = Help
    day.add_options(gpu)
    gpu.set_defaults(command=day.run, works=lambda parsed: not parsed.list)


def _bench(benchmark: Benchmark, arguments: Namespace) -> int:
    with waiting("measuring"):
        output = benchmark.run(arguments)
    print(output)
    return 0
