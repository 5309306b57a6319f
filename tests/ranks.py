"""Runs a function in several processes, as the ranks of one job, and brings their results back.

`run_ranks("tests.models.rank_jobs:sharded_load", world=2, arguments={...})` starts two Python processes with the
environment that torchrun would give them, calls the function with the arguments in each, and returns its JSON results
in rank order. The function sets up its process group itself; the process ends it in good order.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cl_dist.process_end import end_with

REPOSITORY = Path(__file__).resolve().parents[1]
POLL_SECONDS = 0.05
STDERR_CHARACTERS = 6000


class RankFailed(AssertionError):
    """A rank ended with an error or not in time; the message holds the end of its standard error."""


def run_ranks(
    function_path: str,
    world: int,
    arguments: dict[str, Any] | None = None,
    timeout: float = 180.0,
    environment: dict[str, str] | None = None,
) -> list[Any]:
    """Call `module:function` with keyword `arguments` (JSON) in `world` processes and return one result a rank.

    `environment` adds variables to the ranks' own. Raises RankFailed where a rank fails or `timeout` seconds have
    passed; the other ranks are killed then.
    """
    with tempfile.TemporaryDirectory(prefix="ranks-") as name:
        folder = Path(name)
        (folder / "arguments.json").write_text(json.dumps(arguments or {}), encoding="utf-8")
        port = free_port()
        ranks = [_start(function_path, folder, rank, world, port, environment or {}) for rank in range(world)]
        try:
            _wait(ranks, folder, time.monotonic() + timeout, timeout)
        finally:
            _end(ranks)
            _clear_shared_memory(port)
        return [json.loads((folder / f"result-{rank}.json").read_text(encoding="utf-8")) for rank in range(world)]


def free_port() -> int:
    """A TCP port of this machine that is free now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


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


def _start(
    function_path: str, folder: Path, rank: int, world: int, port: int, environment: dict[str, str]
) -> subprocess.Popen[bytes]:
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]))
    variables = {**os.environ, "PYTHONPATH": path, **rank_environment(rank, world, port), **environment}
    with open(folder / f"stdout-{rank}", "wb") as out, open(folder / f"stderr-{rank}", "wb") as err:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.ranks", function_path, str(folder), str(rank)],
            env=variables,
            stdout=out,
            stderr=err,
            start_new_session=True,
        )


def _wait(ranks: Sequence[subprocess.Popen[bytes]], folder: Path, deadline: float, timeout: float) -> None:
    """Return when every rank has ended well; raise RankFailed at the first that has not, or after the deadline."""
    while True:
        codes = [process.poll() for process in ranks]
        for rank, code in enumerate(codes):
            if code not in (None, 0):
                raise RankFailed(f"rank {rank} of {len(ranks)} ended with code {code}:\n{_told(folder, rank)}")
        if None not in codes:
            return
        if time.monotonic() > deadline:
            rank = codes.index(None)
            raise RankFailed(f"rank {rank} of {len(ranks)} still ran after {timeout:g} s:\n{_told(folder, rank)}")
        time.sleep(POLL_SECONDS)


def _told(folder: Path, rank: int) -> str:
    """The end of what a rank wrote to its standard error."""
    return (folder / f"stderr-{rank}").read_text(encoding="utf-8", errors="replace")[-STDERR_CHARACTERS:]


def _end(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    """Kill what still runs, each rank with the processes it started."""
    for process in ranks:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _clear_shared_memory(port: int) -> None:
    """Remove the buffers that DeepSpeed's CPU communication leaves behind when a rank is killed."""
    for buffer in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"):
        buffer.unlink(missing_ok=True)


def _serve(function_path: str, folder: Path, rank: int) -> None:
    """Be one rank: call the function, write its result, leave the process group in good order."""
    module, _, function = function_path.partition(":")
    arguments = json.loads((folder / "arguments.json").read_text(encoding="utf-8"))
    result = getattr(importlib.import_module(module), function)(**arguments)
    (folder / f"result-{rank}.json").write_text(json.dumps(result), encoding="utf-8")
    if "torch.distributed" in sys.modules:
        _leave_group()


def _leave_group() -> None:
    """Without the barrier the first rank to end can take the others' connections down with it."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def _main() -> int:
    _serve(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
    return 0


if __name__ == "__main__":
    end_with(_main)
