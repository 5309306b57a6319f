"""Starts ranks quickly: a process that has imported everything once and forks a rank whenever it is asked to.

Importing torch, transformers, deepspeed and peft takes longer than the tiny runs of the tests. The forked ranks are
real processes with the environment that torchrun would give them; they run the real command line, or a function of the
tests (`tests/ranks.py`). The parent never computes anything, so that no thread is lost in the fork.

One parent serves the whole session (`shared`), or, with several workers of pytest-xdist, all files of a worker.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

REPOSITORY = Path(__file__).resolve().parents[1]
GRACE_SECONDS = 15.0
"""How long the other ranks may live on after one has failed: they notice it at once, but a busy machine is slow to end
them."""
MODULES = (
    "deepspeed",
    "deepspeed.runtime.zero.muon.original_muon",  # compiles when imported, and so needs torch's whole compiler
    "peft",
    "datasets",
    "transformers.models.llama.modeling_llama",
    "transformers.models.roberta.modeling_roberta",
    "transformers.models.t5.modeling_t5",
    "cl_dist.coordinator",
    "cl_dist.cli",
    "cl_dist.cli.parser",
    "cl_dist.cli.run",
    "cl_dist.assembly",
)
"""What a rank imports, also later than at its start."""
PORTS = range(10000, 20000)
"""Ports for the tests: below those that the launcher chooses, and below Linux's range for outgoing connections."""


class Outcome(NamedTuple):
    """How a run ended."""

    codes: list[int]
    """Exit code per rank; minus the signal's number where a signal ended it."""
    output: list[str]
    """Standard output and error per rank."""


class Zygote:
    """The parent process, from the outside."""

    def __init__(self) -> None:
        path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]))
        variables = {**os.environ, **rank_environment(0, 1, 0), "PYTHONPATH": path}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.zygote"],
            env=variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    @property
    def lives(self) -> bool:
        """Whether the process can still be asked for ranks."""
        return self._process.poll() is None

    def run(
        self,
        argv: list[str],
        folder: Path,
        world: int = 1,
        fault: dict[str, Any] | None = None,
        timeout: float = 180.0,
        environment: dict[str, str] | None = None,
    ) -> Outcome:
        """Run `cl-dist ARGV` on `world` ranks; output goes to files in `folder`. `fault` is for
        `tests.faults.moments`, or for the `module` that it names. `environment` adds variables to the ranks' own."""
        return self._start({"argv": argv, "fault": fault}, folder, world, timeout, environment)

    def call(
        self,
        function: str,
        folder: Path,
        world: int,
        arguments: dict[str, Any],
        timeout: float,
        environment: dict[str, str] | None = None,
    ) -> Outcome:
        """Call `module:function` with keyword `arguments` on `world` ranks. Their JSON results go to
        `result-RANK.json` in `folder`, the rest is as in `run`."""
        return self._start({"function": function, "arguments": arguments}, folder, world, timeout, environment)

    def load(self, *modules: str) -> None:
        """Import modules in the parent, for all ranks from now on."""
        self._ask({"modules": modules})

    def close(self) -> None:
        """End the parent."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _start(
        self, job: dict[str, Any], folder: Path, world: int, timeout: float, environment: dict[str, str] | None
    ) -> Outcome:
        port = free_port()
        job |= {"folder": str(folder), "world": world, "timeout": timeout, "port": port}
        codes = self._ask(job | {"environment": environment or {}})
        if any(codes):
            _clear_shared_memory(port)
        return Outcome(codes, [(folder / f"rank-{rank}.txt").read_text(errors="replace") for rank in range(world)])

    def _ask(self, job: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the parent of all ranks has ended (exit code {self._process.wait()})")
        return json.loads(answer)


def shared() -> Zygote:
    """The parent of all ranks of this process's tests; started at the first call, and again if it has died."""
    global _shared
    if _shared is None or not _shared.lives:
        _shared = Zygote()
        atexit.register(_shared.close)
    return _shared


_shared: Zygote | None = None


def free_port() -> int:
    """A TCP port of this machine that is free now, and that no outgoing connection will be given later."""
    while True:
        port = random.SystemRandom().choice(PORTS)
        with socket.socket() as listener:
            try:
                listener.bind(("", port))
            except OSError:
                continue
            return port


def rank_environment(rank: int, world: int, port: int) -> dict[str, str]:
    """The variables that a launcher gives a rank, for CPU ranks on this machine."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "PYTHONFAULTHANDLER": "1",
    }


def _clear_shared_memory(port: int) -> None:
    """Remove the buffers that DeepSpeed's CPU communication leaves behind when a rank is killed."""
    for buffer in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"):
        buffer.unlink(missing_ok=True)


def preload(*modules: str) -> None:
    """Import what a rank needs; a process that has done so may fork ranks while it computes nothing itself."""
    for name in (*MODULES, *modules):
        import_module(name)
    gc.collect()
    gc.freeze()  # a rank's collections leave the pages that it shares with this process alone


def _serve() -> None:
    preload()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        job = json.loads(line)
        if "modules" in job:
            preload(*job["modules"])
            answer: list[int] = []
        else:
            Path(job["folder"]).mkdir(parents=True, exist_ok=True)
            ranks = [fork_rank(job, rank) for rank in range(job["world"])]
            answer = wait_for_ranks(ranks, job["timeout"])
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def fork_rank(job: dict[str, Any], rank: int) -> int:
    """Fork rank `rank` of a job (see `Zygote.run` and `Zygote.call`) and return its process id.

    A job may have two more entries: `output`, the file descriptor that its first rank prints to, and `foreign`, those
    that its ranks are to close.
    """
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setsid()
        os.environ.update(rank_environment(rank, job["world"], job["port"]) | job.get("environment", {}))
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
    if "function" in job:
        _call(job, rank)
        return 0
    if job["fault"] is not None:
        module = job["fault"].pop("module", "tests.faults.moments")
        import_module(module).arm(rank=rank, **job["fault"])
    return int(import_module("cl_dist.cli").main(job["argv"]))


def _call(job: dict[str, Any], rank: int) -> None:
    """Call the job's function, write its result, leave the process group in good order."""
    module, _, function = job["function"].partition(":")
    result = getattr(import_module(module), function)(**job["arguments"])
    Path(job["folder"], f"result-{rank}.json").write_text(json.dumps(result), encoding="utf-8")
    dist = import_module("torch.distributed")
    if dist.is_initialized():
        dist.barrier()  # without it the first rank to end can take the others' connections down with it
        dist.destroy_process_group()


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
                try:
                    os.killpg(pid, signal.SIGKILL)  # with the processes that it started
                except ProcessLookupError:  # it has no session of its own yet
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return [codes[pid] for pid in ranks]


if __name__ == "__main__":
    _serve()
