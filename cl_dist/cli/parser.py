"""The commands and their options."""

from __future__ import annotations

from argparse import SUPPRESS, ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from itertools import takewhile

from cl_dist import __version__
from cl_dist.cli import bench, compare, completion, data, doctor, evaluate, init, inspect, plan, report, run, slurm

_EPILOG = """\
examples:
  cl-dist init my.yaml --data a.jsonl b.csv           a recipe for your own data
  cl-dist run quickstart                              a shipped recipe
  cl-dist run my.yaml --set method.name=migu          your own recipe, with a change
  cl-dist run my.yaml --set method.name=migu --resume continue where it stopped
  cl-dist recipe --explain train.                     what the settings below train mean

exit codes: 0 success, 2 bad input, 75 interrupted (continue with --resume), 76 a rank was lost
(only for ranks that Slurm or MPI started; continue with --resume), 1 any other failure
"""


def parse(arguments: Sequence[str]) -> Namespace:
    """Parse a command line.

    The result also has `command`, a function from the result to the exit code, `works`, a function that returns whether
    the command does more than print, and `argv`, the command line itself.

    Raises SystemExit, with the exit code, after argparse has printed an error or its help.
    """
    parser = build_parser()
    for word in takewhile(lambda word: word != "--", arguments):
        option, _, value = word.partition("=")
        if option.startswith("--") and value == "--":  # argparse would drop it and leave no value at all
            parser.error(f"argument {option}: '--' is not a value")
    parsed = parser.parse_args(arguments)
    parsed.argv = list(arguments)
    return parsed


def build_parser() -> ArgumentParser:
    """The parser, with all commands and their options."""
    parser = ArgumentParser(
        prog="cl-dist",
        description="Continual learning for language models on DeepSpeed ZeRO shards.",
        epilog=_EPILOG,
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.set_defaults(works=lambda parsed: False)
    parser.add_argument("--version", action="version", version=f"cl-dist {__version__}")
    # The deepspeed launcher inserts this option before the command; the rank itself is read from the environment.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=SUPPRESS)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    common = ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show tracebacks")
    changes = ArgumentParser(add_help=False)
    changes.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="changes",
        help="change a setting of the recipe, for example train.epochs=3 (may be repeated)",
    )
    for module in (init, data, run, plan, compare, slurm, evaluate, inspect, report, bench, doctor, completion):
        module.add_commands(commands, common, changes)
    return parser
