"""Settings of TaSL, which is KIF with other defaults."""

from __future__ import annotations

from typing import Literal

from cl_dist.config.ranges import NonNegative
from cl_dist.methods.config import settings
from cl_dist.methods.kif.config import KifConfig


@settings
class TaslConfig(KifConfig):
    """TaSL, the first version of KIF: matrices are the units and fusion is hard (arXiv 2408.09857)."""

    name: Literal["tasl"]  # type: ignore[assignment]
    """Name of the method."""
    units: Literal["auto", "matrix", "rank", "row"] = "matrix"
    """What is scored and fused as one unit: `matrix` (paper) is a whole parameter, with LoRA each lora_A and each
    lora_B; `rank`, `row` and `auto` as in kif."""
    order: Literal["first", "second", "mixed"] = "first"
    """Importance of an element with weight w and gradient g: `first` (paper) is abs(w g), `second` its square, `mixed`
    abs(w g - (w g)^2 / 2)."""
    fusion: Literal["adaptive", "hard"] = "hard"
    """`hard` (paper): masks; a unit that is important to one side alone keeps that side's weights. `adaptive` (KIF):
    shares are a softmax of the scores."""
    orthogonal: Literal["auto"] | NonNegative = 0.0
    """Weight of the penalty that keeps LoRA's ranks orthogonal; 0 (paper) turns it off, `auto` is 0.1 with LoRA."""
