"""Settings of layerwise importance sampled AdamW."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import ClassVar, Literal

from cl_dist.config.ranges import PositiveInt
from cl_dist.methods.config import Exclusion, MethodConfig, Role, settings


@settings
class LisaConfig(MethodConfig):
    """LISA, layerwise importance sampled AdamW: trains a few random transformer blocks at a time, and what is outside
    the blocks always (arXiv 2403.17919).
    """

    METHOD: ClassVar[str] = "cl_dist.methods.lisa.method:Lisa"
    ROLES: ClassVar[Collection[Role]] = (Role.SELECTS,)
    EXCLUDES: ClassVar[Sequence[Exclusion]] = (
        Exclusion(Role.SELECTS, "each of them chooses which part of the weights is trained; give one of them"),
    )

    name: Literal["lisa"]
    """Name of the method."""
    blocks: PositiveInt = 2
    """Number of blocks that are trained at a time (public code: lisa_activated_layers 2)."""
    interval: PositiveInt = 20
    """Optimiser steps after which other blocks are drawn (public code: lisa_interval_steps 20)."""
