"""Runs a function in several processes, as the ranks of one job, and brings their results back.

`run_ranks("tests.models.rank_jobs:sharded_load", world=2, arguments={...})` starts two processes with the environment
that torchrun would give them, calls the function with the arguments in each, and returns its JSON results in rank
order. The function sets up its process group itself; the process ends it in good order. The processes are forks of one
that has imported everything (`tests/zygote.py`).
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from tests.zygote import REPOSITORY, free_port, rank_environment, shared

__all__ = ["REPOSITORY", "RankFailed", "free_port", "rank_environment", "run_ranks"]
OUTPUT_CHARACTERS = 6000


class RankFailed(AssertionError):
    """A rank ended with an error or not in time; the message holds the end of its output."""


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
        outcome = shared().call(function_path, folder, world, arguments or {}, timeout, environment)
        # A rank that failed by itself says more than one that was killed because of it.
        failed = sorted((code < 0, rank) for rank, code in enumerate(outcome.codes) if code != 0)
        if failed:
            rank = failed[0][1]
            raise RankFailed(
                f"rank {rank} of {world} failed or took more than {timeout:g} s (exit codes {outcome.codes}):\n"
                f"{outcome.output[rank][-OUTPUT_CHARACTERS:]}"
            )
        return [json.loads((folder / f"result-{rank}.json").read_text(encoding="utf-8")) for rank in range(world)]
