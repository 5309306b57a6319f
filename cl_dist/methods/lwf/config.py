"""Settings of LwF."""

from __future__ import annotations

from collections.abc import Collection
from typing import ClassVar, Literal

from cl_dist.config.ranges import Divisor, NonNegative, PositiveInt
from cl_dist.methods.config import Need, VariedConfig, settings


@settings
class LwfConfig(VariedConfig):
    """LwF, learning without forgetting: also learns the old model's responses to the new task's samples (arXiv
    1606.09282).
    """

    METHOD: ClassVar[str] = "cl_dist.methods.lwf.method:Lwf"
    NEEDS: ClassVar[Collection[Need]] = (Need.PROBE,)
    VARIED: ClassVar[tuple[str, ...]] = ("weight", "temperature")

    name: Literal["lwf"]
    """Name of the method."""
    weight: NonNegative = 1.0
    """Weight of the divergence from the old model, relative to the loss; both are means over targets."""
    temperature: Divisor = 2.0
    """Temperature that divides both models' logits (paper: 2); the divergence is multiplied by its square."""
    top_k: PositiveInt | None = 64
    """Number of the old model's most likely classes (tokens) to keep for each target; all others count as one class.
    null: all classes, 4 bytes each."""
