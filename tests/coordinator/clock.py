"""A clock that only a rank's device moves: what it has queued is done once somebody reads a result from it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from cl_dist.coordinator import stream
from cl_dist.engine.stop import StopRequest
from cl_dist.engine.trainer import TaskTrainer

HOST_SECONDS, DEVICE_SECONDS = 1.0, 3.0
"""A step keeps the host busy for the first time, and leaves the device that much more to do (AdamW and the gather)."""


def arm(rank: int, **_: Any) -> None:
    """Replace the coordinator's clock on this rank."""
    now, queued = [0.0], [0.0]
    step, agreed_with = TaskTrainer.step, StopRequest.agreed_with

    def stepping(*arguments: Any) -> Any:
        result = step(*arguments)
        now[0] += HOST_SECONDS
        queued[0] += DEVICE_SECONDS
        return result

    def agreeing(*arguments: Any) -> Any:
        result = agreed_with(*arguments)  # reads the sums from the device
        now[0] += queued[0]
        queued[0] = 0.0
        return result

    TaskTrainer.step, StopRequest.agreed_with = stepping, agreeing  # type: ignore[method-assign]
    stream.time = SimpleNamespace(monotonic=lambda: now[0])  # type: ignore[assignment]
