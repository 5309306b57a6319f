"""An exception of a command becomes a message and an exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from cl_dist.cli.failures import guarded
from cl_dist.errors import BadInput, ClDistError, Interrupted
from tests.cli.conftest import Command

PROGRAM = Path(sys.executable).with_name("cl-dist")


class TestFailures:
    """An exception of a command becomes a message and an exit code."""

    @pytest.mark.parametrize(
        ("error", "code", "text"),
        [
            (BadInput("train.epochs: no"), 2, "cl-dist: error: train.epochs: no\n"),
            (BadInput("first\nsecond"), 2, "cl-dist: error: first\ncl-dist: error: second\n"),
            (ClDistError("the disk is full"), 1, "cl-dist: error: the disk is full\n"),
            (Interrupted("stopped after step 3"), 75, "cl-dist: interrupted: stopped after step 3\n"),
            (KeyboardInterrupt(), 75, "cl-dist: interrupted: stopped before anything was started\n"),
            (
                OSError("a\nb"),
                1,
                "cl-dist: error: internal error: OSError: a b (run again with --debug for the traceback)\n",
            ),
        ],
    )
    def test_each_kind(self, error: BaseException, code: int, text: str, capsys: pytest.CaptureFixture[str]) -> None:
        def fail(arguments: Namespace) -> int:
            raise error

        assert guarded(Namespace(command=fail, debug=False)) == code
        assert capsys.readouterr().err == text

    def test_debug_shows_the_traceback_too(self, command: Command) -> None:
        code, _, error = command("run", "absent.yaml", "--debug")
        assert code == 2
        assert error.startswith("Traceback")
        assert error.splitlines()[-1].startswith("cl-dist: error: absent.yaml: the recipe cannot be read")

    def test_a_launched_rank_leaves_its_message_to_the_launcher(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def fail(arguments: Namespace) -> int:
            raise BadInput("train.epochs: no")

        monkeypatch.setenv("CL_DIST_FAILURE_FILE", str(tmp_path / "rank-0.json"))
        assert guarded(Namespace(command=fail, debug=False)) == 2
        assert capsys.readouterr().err == ""
        assert json.loads((tmp_path / "rank-0.json").read_text())["message"] == "train.epochs: no"

    def test_a_reader_that_leaves_early_is_not_an_error(self) -> None:
        reader, writer = os.pipe()
        os.close(reader)
        end = subprocess.run([PROGRAM, "methods"], stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
        os.close(writer)
        assert (end.returncode, end.stderr) == (141, "")
