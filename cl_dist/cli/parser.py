"""The commands and their options."""

from __future__ import annotations

from argparse import SUPPRESS, ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from itertools import takewhile

from cl_dist import __version__
from cl_dist.cli import bench, compare, doctor, evaluate, inspect, report, run, slurm

_EPILOG = """\
examples:
  cl-dist run quickstart                              a shipped recipe
  cl-dist run my.yaml --set method.name=migu          your own, with a change
  cl-dist run my.yaml --set method.name=migu --resume go on where it stopped
  cl-dist recipe --explain                            every setting

exit codes: 0 done, 2 bad input, 75 interrupted (go on with --resume), 76 a rank was lost (told by
ranks that Slurm or MPI has started; go on with --resume), 1 anything else
"""


def parse(arguments: Sequence[str]) -> Namespace:
    """What a command line asks for; `command` is a function from it to the exit code, `works` one that says whether
    the command does something besides printing, and `argv` the command line itself.

    Raises SystemExit, with the exit code, where argparse has said what is wrong or printed its help.
    """
    parser = build_parser()
    for word in takewhile(lambda word: word != "--", arguments):
        option, _, value = word.partition("=")
        if option.startswith("--") and value == "--":  # argparse takes it away, and leaves no value at all
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
    # The deepspeed launcher puts this before the command; the rank is read from the environment.
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
        help="change a setting of the recipe, for example train.epochs=3 (may be given several times)",
    )
    for module in (run, compare, slurm, evaluate, inspect, report, bench, doctor):
        module.add_commands(commands, common, changes)
    return parser
