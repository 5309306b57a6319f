"""The command line itself."""

from __future__ import annotations

from argparse import ArgumentParser, _SubParsersAction
from collections.abc import Iterator

import pytest

from cl_dist import __version__
from cl_dist.cli.parser import COMMANDS, Help, build_parser
from tests.cli.conftest import Command


def test_the_version(command: Command) -> None:
    assert command("--version") == (0, f"cl-dist {__version__}\n", "")


@pytest.mark.parametrize("name", [name for commands in COMMANDS.values() for name in commands])
def test_the_help_of_a_command_says_what_it_does(command: Command, name: str) -> None:
    code, output, _ = command(name, "--help")
    assert code == 0
    sentence = output.split("\n\n")[1]
    assert sentence[0].isupper()
    assert sentence.endswith(".")


def all_parsers(parser: ArgumentParser) -> Iterator[ArgumentParser]:
    """A parser and the parsers of all its commands."""
    yield parser
    for action in parser._actions:
        if isinstance(action, _SubParsersAction):
            for each in action.choices.values():
                yield from all_parsers(each)


def test_every_help_fits_into_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    parsers = list(all_parsers(build_parser()))
    assert len(parsers) > 20
    for parser in parsers:
        long = [line for line in parser.format_help().splitlines() if len(line) >= 80]
        assert not long, parser.prog


def test_a_help_is_filled_up_to_the_terminals_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    parser = ArgumentParser(
        prog="p", description="a\n" * 40 + "\nb\n", epilog="examples:\n  p one\n  p two\nc\nd", formatter_class=Help
    )
    group = parser.add_argument_group("with", "some\nwords")
    group.add_argument("--one")
    text = parser.format_help()
    assert "\n" + " ".join("a" * 29) + "\n" + " ".join("a" * 11) + "\n\nb\n\n" in text
    assert "\nwith:\n  some words\n" in text
    assert text.endswith("\nexamples:\n  p one\n  p two\nc d\n")
