"""Bytes that the ranks exchange, by collective."""

from __future__ import annotations

from dataclasses import dataclass

from cl_dist.methods.cost import Collective
from cl_dist.planning.setup import Setup
from cl_dist.planning.shape import ModelShape


@dataclass(frozen=True)
class Wire:
    """Collectives of one rank."""

    step: tuple[Collective, ...]
    """Of every optimiser step, without the methods'."""
    methods_step: tuple[Collective, ...]
    """What the methods add to every step."""
    methods_task: tuple[Collective, ...]
    """What the methods add at the end of every task."""


def plan_wire(setup: Setup, shape: ModelShape) -> Wire:
    """The collectives of an optimiser step."""
    raise NotImplementedError
