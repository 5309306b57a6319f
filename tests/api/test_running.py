"""`cl_dist.run` starts ranks as the command line does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import cl_dist
from cl_dist.api.running import _failure, _printed
from cl_dist.errors import BadInput, ClDistError, Interrupted
from tests.cli.conftest import RANK_VARIABLES
from tests.recipes import write_recipe
from tests.report.runs import write_run


@pytest.fixture(autouse=True)
def no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in RANK_VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_what_the_command_line_refuses_is_an_exception(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """test_notebook.py has a whole run."""
    write_run(tmp_path / "run", ["spring"], done=1)
    recipe = cl_dist.Recipe.load(write_recipe(tmp_path), launch={"device": "cpu"})
    with pytest.raises(BadInput, match=r"run holds a run already .*continue it with --resume"):
        cl_dist.run(recipe, method={"name": "migu", "threshold": 0.5})
    printed = capsys.readouterr()
    assert "builtin:llama-tiny, 2 tasks, migu" in printed.out
    assert "checking data and model" in printed.out
    assert printed.err == "", "the exception has the message"
    with pytest.raises(BadInput, match=r"--resume and --fresh exclude each other"):
        cl_dist.run(recipe, progress=False, resume=True, fresh=True)
    assert capsys.readouterr() == ("", "")


def test_a_bad_recipe_starts_no_process() -> None:
    with pytest.raises(BadInput, match=r"qickstart: neither a shipped recipe nor a YAML file.*did you mean quickstart"):
        cl_dist.run("qickstart")
    with pytest.raises(BadInput, match=r"train\.epochs"):
        cl_dist.run("quickstart", train={"epochs": -1})


def test_failures_are_exceptions_of_their_kind() -> None:
    assert isinstance(_failure(75, ["cl-dist: interrupted: stopped after step 2"]), Interrupted)
    lost = _failure(1, ["cl-dist: error: rank 1: no memory", "cl-dist: error: and more"])
    assert (type(lost), str(lost)) == (ClDistError, "rank 1: no memory\nand more")
    assert str(_failure(9, [])) == "the run ended with exit code 9 and said nothing"
    assert str(_failure(1, ["Traceback", "ImportError: x"])) == "Traceback\nImportError: x"


def test_an_interrupt_reaches_the_run(tmp_path: Path) -> None:
    """The stop button of a notebook is a KeyboardInterrupt in the kernel."""
    child = (
        "import signal, sys\n"
        "signal.signal(signal.SIGINT, lambda *_: (print('saved', flush=True), sys.exit(75)))\n"
        "print('ready', flush=True)\n"
        "signal.pause()\n"
    )
    script = f"""
import os, signal, sys
from cl_dist.api.running import _printed
class Out:
    def write(self, text):
        sys.__stdout__.write(text)
        if text == "ready\\n":
            os.kill(os.getpid(), signal.SIGINT)
    def flush(self): sys.__stdout__.flush()
sys.stdout = Out()
code, _ = _printed([sys.executable, "-c", {child!r}], progress=True)
sys.exit(code)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, preexec_fn=_interruptible
    )
    assert (done.returncode, done.stdout) == (75, "ready\nsaved\n"), done.stderr


def _interruptible() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_output_that_is_not_text_does_no_harm(capsys: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-c", "import os; os.write(1, b'\\xff\\n'); os.write(2, b'warning\\n')"]
    assert _printed(command, progress=True) == (0, ["warning"])
    assert capsys.readouterr() == ("\ufffd\n", "warning\n")
    assert os.getpid()
