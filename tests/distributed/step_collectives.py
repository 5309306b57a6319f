"""Rank side of test_step_collectives: notes every collective operation of a run that this project asks for."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from cl_dist.engine.stop import StopRequest

OPERATIONS = (
    "all_reduce",
    "broadcast",
    "all_gather",
    "all_gather_into_tensor",
    "reduce",
    "reduce_scatter_tensor",
    "gather",
    "barrier",
    "all_gather_object",
    "broadcast_object_list",
    "gather_object",
)


def arm(rank: int, log: str) -> None:
    """Append one line to `log` after each step of rank 0: the operations since the step before."""
    noted: list[list[Any]] = []

    def noting(name: str) -> None:
        original = getattr(torch.distributed, name)

        def wrapped(*arguments: Any, **named: Any) -> Any:
            caller = Path(sys._getframe(1).f_code.co_filename)
            if "cl_dist" in caller.parts and caller.parent.name != "torch":
                tensor = arguments[0] if arguments and isinstance(arguments[0], torch.Tensor) else None
                noted.append([name, None if tensor is None else tensor.numel(), f"{caller.parent.name}/{caller.name}"])
            return original(*arguments, **named)

        setattr(torch.distributed, name, wrapped)

    for name in OPERATIONS:
        noting(name)
    agreed_with = StopRequest.agreed_with

    def marking(self: StopRequest, *values: float) -> Any:
        result = agreed_with(self, *values)
        if values and rank == 0:
            with Path(log).open("a", encoding="utf-8") as file:
                file.write(json.dumps(noted) + "\n")
        if values:
            noted.clear()
        return result

    StopRequest.agreed_with = marking  # type: ignore[method-assign]
