from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from cl_dist.cli import main

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "CL_DIST_LAUNCHER_PID")

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """Run `cl-dist` in this process, in an empty folder; returns exit code, standard output and standard error."""
    monkeypatch.chdir(tmp_path)
    for name in RANK_VARIABLES:
        monkeypatch.delenv(name, raising=False)

    def run(*arguments: str | os.PathLike[str]) -> tuple[int, str, str]:
        code = main([os.fspath(argument) for argument in arguments])
        output = capfd.readouterr()
        return code, output.out, output.err

    return run
