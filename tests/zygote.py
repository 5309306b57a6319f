"""Starts `cl-dist` ranks quickly: a process that has imported everything once and forks a rank whenever it is asked to.

Importing torch, transformers, deepspeed and peft takes longer than the tiny runs of the tests. The forked ranks are
real processes with the environment that torchrun would give them; they run the real command line. The parent never
computes anything, so that no thread is lost in the fork.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from tests.ranks import REPOSITORY, free_port, rank_environment

GRACE_SECONDS = 2.0
"""How long the other ranks may live on after one has failed."""


class Outcome(NamedTuple):
    """How a run ended."""

    codes: list[int]
    """Exit code per rank; minus the signal's number where a signal ended it."""
    output: list[str]
    """Standard output and error per rank."""


class Zygote:
    """The parent process, from the outside."""

    def __init__(self, *modules: str) -> None:
        """`modules` are imported along with the project's own."""
        variables = {**os.environ, **rank_environment(0, 1, 0), "PYTHONPATH": str(REPOSITORY)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.zygote", *modules],
            env=variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(
        self, argv: list[str], folder: Path, world: int = 1, fault: dict[str, Any] | None = None, timeout: float = 180.0
    ) -> Outcome:
        """Run `cl-dist ARGV` on `world` ranks; output goes to files in `folder`. `fault` is for
        `tests.faults.moments`, or for the `module` that it names."""
        job = {
            "argv": argv,
            "folder": str(folder),
            "world": world,
            "fault": fault,
            "timeout": timeout,
            "port": free_port(),
        }
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        codes = json.loads(self._process.stdout.readline())
        return Outcome(codes, [(folder / f"rank-{rank}.txt").read_text(errors="replace") for rank in range(world)])

    def close(self) -> None:
        """End the parent."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def preload(*modules: str) -> None:
    """Import what a rank needs; a process that has done so may fork ranks while it computes nothing itself."""
    for name in ("deepspeed", "peft", "datasets", "cl_dist.coordinator", "cl_dist.cli", *modules):
        import_module(name)


def _serve() -> None:
    preload(*sys.argv[1:])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        job = json.loads(line)
        Path(job["folder"]).mkdir(parents=True, exist_ok=True)
        ranks = [fork_rank(job, rank) for rank in range(job["world"])]
        answers.write(json.dumps(wait_for_ranks(ranks, job["timeout"])) + "\n")
        answers.flush()


def fork_rank(job: dict[str, Any], rank: int) -> int:
    """Fork rank `rank` of a job (see `Zygote.run`) and return its process id.

    A job may have two more entries: `output`, the file descriptor that its first rank prints to, and `foreign`, those
    that its ranks are to close.
    """
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setsid()
        os.environ.update(rank_environment(rank, job["world"], job["port"]))
        output = os.open(Path(job["folder"], f"rank-{rank}.txt"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        if rank == 0 and "output" in job:
            output = job["output"]
        for descriptor in job.get("foreign", ()):  # a pipe has no reader only when nobody has that end open
            os.close(descriptor)
        os.dup2(output, 1)
        os.dup2(output, 2)
        code = _be_rank(job, rank)
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 99
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _be_rank(job: dict[str, Any], rank: int) -> int:
    if job["fault"] is not None:
        module = job["fault"].pop("module", "tests.faults.moments")
        import_module(module).arm(rank=rank, **job["fault"])
    return int(import_module("cl_dist.cli").main(job["argv"]))


def wait_for_ranks(ranks: list[int], timeout: float) -> list[int]:
    """Wait for all ranks; once one has failed or time is up, the others get a moment and are killed."""
    codes: dict[int, int] = {}
    deadline = time.monotonic() + timeout
    while len(codes) < len(ranks):
        for pid in set(ranks) - set(codes):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
                if codes[pid] != 0:
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if time.monotonic() > deadline:
            for pid in set(ranks) - set(codes):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return [codes[pid] for pid in ranks]


if __name__ == "__main__":
    _serve()
