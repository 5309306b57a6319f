"""`cl-dist completion`: a script that lets a shell complete commands, options, recipes, files and run folders."""

from __future__ import annotations

from argparse import Action, ArgumentParser, Namespace, _SubParsersAction
from collections.abc import Iterator
from typing import Any

from cl_dist.cli.parser import Help
from cl_dist.config.load import shipped_recipes

SHELLS = ("bash", "zsh", "tcsh")
FOLDERS = ("RUN", "DIR")
FILES = ("FILE", "PATH", "MODULE")
"""How the commands call arguments that are folders or files; RECIPE is a name or a file (`metavar`)."""

_EPILOG = """\
examples:
  bash:
    d=~/.local/share/bash-completion/completions
    mkdir -p $d && cl-dist completion bash > $d/cl-dist
  zsh, with fpath=(~/.zsh $fpath) before compinit in ~/.zshrc:
    mkdir -p ~/.zsh && cl-dist completion zsh > ~/.zsh/_cl-dist
  tcsh, with `source ~/.cl-dist.tcsh` in ~/.tcshrc:
    cl-dist completion tcsh > ~/.cl-dist.tcsh
"""


def add_commands(commands: Any, common: ArgumentParser, changes: ArgumentParser) -> None:
    """Add `completion`; `commands` is argparse's collection of subparsers."""
    parser = commands.add_parser(
        "completion",
        parents=[common],
        epilog=_EPILOG,
        formatter_class=Help,
    )
    parser.add_argument("shell", choices=SHELLS, metavar="SHELL", help="bash, zsh or tcsh")
    parser.set_defaults(command=completion)


def completion(arguments: Namespace) -> int:
    """Print the script. It has the names of the shipped recipes in it, so a new release needs a new one."""
    import shtab

    from cl_dist.cli.parser import build_parser

    parser = build_parser()
    kinds = {
        **dict.fromkeys(FOLDERS, shtab.DIRECTORY),
        **dict.fromkeys(FILES, shtab.FILE),
        "RECIPE": _recipes(list(shipped_recipes())),
    }
    for action in _actions(parser):
        if action.metavar in kinds:
            action.complete = kinds[action.metavar]  # type: ignore[attr-defined]  # where shtab looks for it
    print(shtab.complete(parser, arguments.shell))
    return 0


def _actions(parser: ArgumentParser) -> Iterator[Action]:
    """All arguments of a parser and of its commands."""
    for action in parser._actions:
        yield action
        if isinstance(action, _SubParsersAction):
            for inner in action.choices.values():
                yield from _actions(inner)


def _recipes(names: list[str]) -> dict[str, Any]:
    """How each shell completes a recipe: the name of a shipped one, or a YAML file."""
    words = " ".join(names)
    bash = f"""\
_cl_dist_recipes() {{
  compgen -W "{words}" -- "$1"
  compgen -f -X '!*.yaml' -- "$1"
  compgen -f -X '!*.yml' -- "$1"
  compgen -d -S / -- "$1"
}}
"""
    zsh = f"""\
_cl_dist_recipes() {{
  local -a names
  names=({words})
  compadd -a names
  _files -g '*.(yaml|yml)'
}}
"""
    return {
        "bash": "_cl_dist_recipes",
        "zsh": "_cl_dist_recipes",
        "tcsh": f"`echo {words}; ls -p`",  # one word per file: it has no functions, and no pattern beside a list
        "preamble": {"bash": bash, "zsh": zsh},
    }
