"""The command line itself."""

from __future__ import annotations

import pytest

from cl_dist import __version__
from cl_dist.cli.parser import COMMANDS
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
