"""Settings of LwF."""

from __future__ import annotations

from typing import ClassVar, Literal

from cl_dist.config.ranges import Divisor, NonNegative, PositiveInt
from cl_dist.methods.config import VariedConfig, settings


@settings
class LwfConfig(VariedConfig):
    """LwF, learning without forgetting: the old model's responses on the new task's samples are learnt along (arXiv
    1606.09282).
    """

    METHOD: ClassVar[str] = "cl_dist.methods.lwf.method:Lwf"
    VARIED: ClassVar[tuple[str, ...]] = ("weight", "temperature")

    name: Literal["lwf"]
    """Name of the method."""
    weight: NonNegative = 1.0
    """Weight of the divergence from the old model beside the loss, both in the mean over targets."""
    temperature: Divisor = 2.0
    """What both models' logits are divided by (paper: 2); the divergence is multiplied by its square."""
    top_k: PositiveInt | None = 64
    """How many of the old model's likeliest classes (tokens) are kept for each target; the others count as one. null:
    all, 4 bytes each."""
