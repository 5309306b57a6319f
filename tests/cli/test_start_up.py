"""Ctrl-C while the modules are still being imported, which on a busy machine takes seconds."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

PRESSED = """
import os, signal, sys

class Press:
    def find_spec(self, name, path=None, target=None):
        if name == "pydantic":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Press())
signal.signal(signal.SIGINT, signal.{before})
from cl_dist.cli import program
sys.argv[1:] = ["run", "--help"]
program()
"""


@pytest.mark.parametrize(
    ("before", "code", "output", "errors"),
    [
        ("default_int_handler", 75, "", "cl-dist: interrupted: stopped before anything was started\n"),
        ("SIG_IGN", 0, "usage: cl-dist run ", ""),
    ],
)
def test_ctrl_c_at_start_up_is_one_sentence(before: str, code: int, output: str, errors: str) -> None:
    assert hasattr(signal, before)
    done = subprocess.run(
        [sys.executable, "-c", PRESSED.format(before=before)], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout[: len("usage: cl-dist run ")], done.stderr) == (code, output, errors)


def test_where_the_ends_of_child_processes_would_be_forgotten_they_are_not() -> None:
    script = """
import atexit, os, signal, sys
from cl_dist.cli import program
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
atexit.register(lambda: print(os.waitstatus_to_exitcode(os.waitpid(os.posix_spawn("/bin/false", ["false"], {}), 0)[1])))
sys.argv[1:] = ["--version"]
program()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[1:] == ["1"], done.stderr
