"""Rank side of test_collective_failure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from cl_dist.errors import BadInput, ClDistError
from cl_dist.state.collective_failure import fail_together, on_first_rank
from cl_dist.state.integrity import CheckpointDamaged


def main() -> dict[str, Any]:
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()

    def fail(errors: dict[int, Exception]) -> int:
        if rank in errors:
            raise errors[rank]
        return rank

    def by_first_only(work: Callable[[], Any]) -> Any:
        return on_first_rank(lambda: work() if rank == 0 else 1 / 0)

    full = {0: ClDistError("rank 0's disk is full"), 1: ClDistError("rank 1's disk is full")}
    return {
        "nothing": outcome(lambda: fail({})),
        "expected": outcome(lambda: fail({1: CheckpointDamaged("rank 1's file is damaged")})),
        "both": outcome(lambda: fail(full)),
        "by first": outcome(lambda: by_first_only(lambda: {"rank": rank})),
        "first failed": outcome(lambda: by_first_only(lambda: fail({0: BadInput("it is in use")}))),
        "bug": outcome(lambda: fail({1: KeyError("bug")})),
    }


def outcome(work: Callable[[], Any]) -> list[Any]:
    try:
        return [fail_together(work), None]
    except Exception as error:
        return [None, f"{type(error).__name__}: {error}"]
