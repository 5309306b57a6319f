from __future__ import annotations

import subprocess
import sys

import pytest

from tests.ranks import run_ranks

PROGRAM = """
import atexit, logging, sys
from cl_dist.process_end import end_with

def main():
    import {module}
    logging.basicConfig(stream=sys.stdout, format="%(message)s")
    atexit.register(lambda: print("registered"))
    logging.warning("logged")
    print("printed")
    {last}

end_with(main)
"""


def end(module: str, last: str) -> tuple[int, list[str], str]:
    """Exit code, lines and standard error of a program that loads `module` and ends its `main` with `last`."""
    program = [sys.executable, "-c", PROGRAM.format(module=module, last=last)]
    ended = subprocess.run(program, capture_output=True, text=True, check=False, timeout=120)
    return ended.returncode, ended.stdout.splitlines(), ended.stderr


@pytest.mark.parametrize("module", ["json", "torch"])
def test_exit_code_output_and_atexit_handlers(module: str) -> None:
    lines = ["logged", "printed", "registered"]
    assert end(module, "return 75") == (75, lines, "")
    code, printed, error = end(module, "raise KeyError('k')")
    assert (code, printed) == (1, lines)
    assert error.endswith("KeyError: 'k'\n")
    assert end(module, "sys.stdout.close(); return 3")[0] == 3
    assert [end(module, f"sys.exit({code})")[0] for code in ("4", "None", "'text'")] == [4, 0, 1]
    forked = "import os; pid = os.fork(); pid or sys.exit(5); return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])"
    assert end(module, forked)[0] == 5


def test_a_tensor_that_a_process_groups_thread_releases_late() -> None:
    """The group outlives `destroy_process_group`, as DeepSpeed's does."""
    assert run_ranks("tests.process_end_jobs:drops_late", 2) == [True, True]
