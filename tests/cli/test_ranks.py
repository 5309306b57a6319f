"""How a rank ends that is asked to stop while it does not train."""

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


def run_rank(code: str, number: int, **environment: str) -> tuple[int, str]:
    variables = {**os.environ, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", **environment}
    command = [sys.executable, "-c", code, str(number)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    return done.returncode, done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_stopped_alone_a_rank_of_a_foreign_launcher_does_not_claim_that_all_agreed(number: int) -> None:
    message = "cl-dist: interrupted: stopped outside of training; what was saved is intact\n"
    assert run_rank(STOPPED, number) == (128 + number, message)


def test_our_own_launcher_knows_better_and_gets_75() -> None:
    assert run_rank(STOPPED, signal.SIGTERM, CL_DIST_LAUNCHER_PID=str(os.getpid()))[0] == 75


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_once_all_is_saved_a_signal_changes_the_exit_code_no_more(number: int) -> None:
    assert run_rank(SAVED, number) == (75, "cl-dist: interrupted: saved\n")
