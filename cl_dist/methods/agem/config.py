"""Settings of A-GEM."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from cl_dist.config.ranges import PositiveInt
from cl_dist.methods.config import MethodConfig, Need, settings


@settings
class AgemConfig(MethodConfig):
    """A-GEM, averaged gradient episodic memory: removes the part of a step's gradient that opposes the gradient on past
    samples (arXiv 1812.00420).
    """

    METHOD: ClassVar[str] = "cl_dist.methods.agem.method:Agem"
    NEEDS: ClassVar[Collection[Need]] = (Need.PROBE,)

    name: Literal["agem"]
    """Name of the method."""
    memory_ratio: Annotated[float, Field(gt=0.0, le=1.0)] = 0.02
    """Share of each past task's training samples in the memory, at least one per task, drawn with the seed."""
    memory_batch: PositiveInt | None = None
    """Samples drawn from the memory in each step, whose gradient is the reference; at most a global batch. null: a
    global batch."""
