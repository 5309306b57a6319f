from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.ranks import REPOSITORY, free_port, rank_environment

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
    last = "from tests.process_end_jobs import drops_late; print(drops_late()); return 0"
    program, port = [sys.executable, "-c", PROGRAM.format(module="torch", last=last)], free_port()
    ranks = [
        subprocess.Popen(
            program,
            env={**os.environ, **rank_environment(rank, 2, port), "PYTHONPATH": str(REPOSITORY)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for rank in ranks:
        assert "True" in rank.communicate(timeout=120)[0].splitlines()
        assert rank.returncode == 0
