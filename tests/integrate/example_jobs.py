"""Rank side of test_examples: runs an example in a rank that exists already."""

from __future__ import annotations

import contextlib
import io
import runpy
import sys

from tests.ranks import REPOSITORY


def run(name: str) -> list[str]:
    """The lines that an example prints."""
    folder = REPOSITORY / "examples"
    sys.path.insert(0, str(folder))
    sys.argv = [str(folder / name), "--tiny"]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        runpy.run_path(str(folder / name), run_name="__main__")
    return printed.getvalue().splitlines()
