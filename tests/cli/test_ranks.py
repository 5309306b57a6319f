"""How a rank ends if it is asked to stop while it is not training."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

STOPPED = """
import os, signal, sys
from argparse import Namespace
from cl_dist.cli.failures import guarded
from cl_dist.cli.ranks import run_on_ranks

def work(reporter):
    os.kill(os.getpid(), int(sys.argv[1]))

sys.exit(guarded(Namespace(command=lambda _: run_on_ranks(_, 1, lambda first: None, work, None), debug=False)))
"""
SAVED = STOPPED.replace("import os,", "from cl_dist.errors import Interrupted\nimport atexit, os,").replace(
    "    os.kill(os.getpid(), int(sys.argv[1]))",
    "    atexit.register(os.kill, os.getpid(), int(sys.argv[1]))\n    raise Interrupted('saved')",
)


IMPORTING = STOPPED.replace("import os,", "from cl_dist.stop_requests import imports\nimport os,").replace(
    "    os.kill(os.getpid(), int(sys.argv[1]))",
    "    with imports():\n        try: os.kill(os.getpid(), int(sys.argv[1]))\n        except Exception: os.abort()",
)
"""An extension whose initialisation does not survive an exception."""
WRAPPED = STOPPED.replace(
    "    os.kill(os.getpid(), int(sys.argv[1]))",
    "    try: os.kill(os.getpid(), int(sys.argv[1]))\n    except Exception as e: raise RuntimeError('failed') from e",
)
"""A library that turns every exception into one of its own."""


def run_rank(code: str, number: int, **environment: str) -> tuple[int, str]:
    variables = {**os.environ, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", **environment}
    command = [sys.executable, "-c", code, str(number)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    return done.returncode, done.stderr


@pytest.mark.parametrize("code", [IMPORTING, WRAPPED])
def test_a_request_to_stop_during_imports_is_one_sentence(code: str) -> None:
    message = "cl-dist: interrupted: stopped outside of training; the saved state is intact\n"
    assert run_rank(code, signal.SIGTERM) == (128 + signal.SIGTERM, message)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_single_stopped_rank_of_another_launcher_does_not_exit_with_75(number: int) -> None:
    message = "cl-dist: interrupted: stopped outside of training; the saved state is intact\n"
    assert run_rank(STOPPED, number) == (128 + number, message)


def test_with_our_own_launcher_it_exits_with_75() -> None:
    assert run_rank(STOPPED, signal.SIGTERM, CL_DIST_LAUNCHER_PID=str(os.getpid()))[0] == 75


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_once_everything_is_saved_a_signal_does_not_change_the_exit_code(number: int) -> None:
    assert run_rank(SAVED, number) == (75, "cl-dist: interrupted: saved\n")
