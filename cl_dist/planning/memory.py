"""Bytes that one rank needs, by component."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cl_dist.planning.setup import Setup
from cl_dist.planning.shape import ModelShape


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank, the one that needs most."""

    device: Mapping[str, int]
    """Next to the model, by component. On a CPU, host memory like `host`."""
    host: Mapping[str, int]
    """In CPU memory, by component."""
    disk: Mapping[str, int]
    """Per checkpoint, by component; over all ranks."""

    @property
    def device_peak(self) -> int:
        """Bytes of device memory at the peak of a step."""
        return sum(self.device.values())


def plan_memory(setup: Setup, shape: ModelShape) -> Memory:
    """The memory of the rank that needs most."""
    raise NotImplementedError
