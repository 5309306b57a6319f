"""Settings of A-GEM."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from cl_dist.config.ranges import PositiveInt
from cl_dist.methods.config import MethodConfig, settings


@settings
class AgemConfig(MethodConfig):
    """A-GEM, averaged gradient episodic memory: what in a step's gradient points against the past samples' is taken out
    (arXiv 1812.00420).
    """

    METHOD: ClassVar[str] = "cl_dist.methods.agem.method:Agem"

    name: Literal["agem"]
    """Name of the method."""
    memory_ratio: Annotated[float, Field(gt=0.0, le=1.0)] = 0.02
    """Share of every past task's training samples that makes the memory, at least one of each, drawn by the seed."""
    memory_batch: PositiveInt | None = None
    """Samples of the memory, drawn anew for every step, whose gradient is the reference; at most a global batch, which
    is what null takes."""
