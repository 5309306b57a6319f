"""The commands and their options."""

from __future__ import annotations

import textwrap
from argparse import SUPPRESS, ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from importlib import import_module
from itertools import takewhile
from typing import Any

from typing_extensions import override

from cl_dist import __version__

COMMANDS = {
    "init": {"init": "write a recipe for your own data"},
    "data": {"data": "show what a recipe reads: counts, lengths, labels, and samples with what is learnt"},
    "run": {"run": "train a model on a stream of tasks"},
    "plan": {"plan": "predict memory, communication and time on machines that are not here"},
    "compare": {"compare": "run a grid of methods, orders and seeds, and write one table"},
    "slurm": {"slurm": "run a recipe as a Slurm job that survives preemption and time limits"},
    "evaluate": {"eval": "evaluate a model that a run has saved"},
    "inspect": {
        "status": "show the progress of a run and its results so far",
        "recipe": "list, print or explain recipes",
        "methods": "list the methods and what they compose with",
    },
    "report": {"report": "write a page with the results of a run, finished or not, or of several side by side"},
    "export": {"export": "write a saved model as a plain Hugging Face folder, and upload it"},
    "bench": {"bench": "measure the operations and the training step"},
    "doctor": {"doctor": "check this machine and what is installed"},
    "completion": {"completion": "print a script for your shell that completes what you type"},
}
"""Modules of `cl_dist.cli`, and what each of their commands does. Only the module of the command that is given gets
imported: most of the time that `--help` took went into modules that it did not use."""

_EPILOG = """\
examples:
  cl-dist init my.yaml --data a.jsonl b.csv       a recipe for your own data
  cl-dist run quickstart                          a shipped recipe
  cl-dist run my.yaml --set method.name=migu      your recipe, with a change
  cl-dist run my.yaml --resume                    continue where it stopped
  cl-dist recipe --explain train.                 the settings below train

exit codes: 0 success, 2 bad input, 75 interrupted (continue with --resume),
76 a rank was lost (only for ranks that Slurm or MPI started; continue with
--resume), 1 any other failure
"""


def parse(arguments: Sequence[str]) -> Namespace:
    """Parse a command line.

    The result also has `command`, a function from the result to the exit code, `works`, a function that returns whether
    the command does more than print, and `argv`, the command line itself.

    Raises SystemExit, with the exit code, after argparse has printed an error or its help.
    """
    parser = build_parser(_named(arguments))
    for word in takewhile(lambda word: word != "--", arguments):
        option, _, value = word.partition("=")
        if option.startswith("--") and value == "--":  # argparse would drop it and leave no value at all
            parser.error(f"argument {option}: '--' is not a value")
    parsed = parser.parse_args(arguments)
    parsed.argv = list(arguments)
    return parsed


def import_command(arguments: Sequence[str]) -> None:
    """Import the module of the command in `arguments`."""
    named = _named(arguments)
    for module, commands in COMMANDS.items():
        if named in commands:
            import_module(f"cl_dist.cli.{module}")


def _named(arguments: Sequence[str]) -> str:
    """The first word that is a command; "" without one. What precedes a command is never the name of another."""
    names = {name for commands in COMMANDS.values() for name in commands}
    return next((word for word in arguments if word in names), "")


class Help(RawDescriptionHelpFormatter):
    """Fills paragraphs up to the terminal's width, and leaves indented lines, such as examples, as they are."""

    @override
    def _fill_text(self, text: str, width: int, indent: str) -> str:
        pieces: list[list[str]] = []
        for line in text.splitlines():
            prose = bool(line) and not line.startswith(" ")
            if prose and pieces and pieces[-1][-1] and not pieces[-1][-1].startswith(" "):
                pieces[-1].append(line)
            else:
                pieces.append([line])
        filled = (" ".join(piece) for piece in pieces)
        return "\n".join(
            f"{indent}{line}"
            if line.startswith(" ")
            else textwrap.fill(line, width, initial_indent=indent, subsequent_indent=indent, break_long_words=False)
            for line in filled
        )


class _Commands:
    """The subparsers as the modules of commands see them: it knows what each command does."""

    def __init__(self, subparsers: Any, summaries: dict[str, str]) -> None:
        self._subparsers, self._summaries = subparsers, summaries

    def add_parser(self, name: str, **options: Any) -> ArgumentParser:
        """Add the parser of a command; `options` as for ArgumentParser."""
        summary = self._summaries[name]
        sentence = f"{summary[0].upper()}{summary[1:]}."
        parser: ArgumentParser = self._subparsers.add_parser(name, help=summary, **{"description": sentence, **options})
        return parser


def build_parser(command: str | None = None) -> ArgumentParser:
    """The parser with all commands. With `command` (a name, or "" for none), only that one has its options."""
    parser = ArgumentParser(
        prog="cl-dist",
        description="Continual learning for language models on DeepSpeed ZeRO shards.",
        epilog=_EPILOG,
        formatter_class=Help,
    )
    parser.set_defaults(works=lambda parsed: False)
    parser.add_argument("--version", action="version", version=f"cl-dist {__version__}")
    # The deepspeed launcher inserts this option before the command; the rank itself is read from the environment.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=SUPPRESS)
    subparsers = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
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
    for module, summaries in COMMANDS.items():
        commands = _Commands(subparsers, summaries)
        if command is None or command in summaries:
            import_module(f"cl_dist.cli.{module}").add_commands(commands, common, changes)
        else:
            for name in summaries:
                commands.add_parser(name)
    return parser
