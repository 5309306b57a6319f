"""Settings of half fine-tuning."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from cl_dist.methods.config import settings
from cl_dist.methods.selective.config import SelectiveConfig


@settings
class HftConfig(SelectiveConfig):
    """HFT, half fine-tuning: freezes a random half of each block's matrices in every task (arXiv 2404.18466)."""

    METHOD: ClassVar[str] = "cl_dist.methods.hft.method:Hft"

    name: Literal["hft"]
    """Name of the method."""
    keep: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    """Share of matrices (and of norms) that a task trains, of each kind in a block: attention, feed-forward, norms. An
    odd number is rounded up in a random half of the blocks and down in the other, as in the paper."""
