"""The command line itself."""

from __future__ import annotations

from cl_dist import __version__
from tests.cli.conftest import Command


def test_the_version(command: Command) -> None:
    assert command("--version") == (0, f"cl-dist {__version__}\n", "")
