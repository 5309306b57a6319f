"""Settings of source-shielded updates."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from cl_dist.config.ranges import PositiveInt
from cl_dist.methods.config import Need, settings
from cl_dist.methods.selective.config import SelectiveConfig, refuse_adapters

if TYPE_CHECKING:
    from cl_dist.config.schema import Recipe


@settings
class SsuConfig(SelectiveConfig):
    """SSU, source-shielded updates: freezes the input columns of each matrix that matter most to what the model should
    keep, measured on samples of it (arXiv 2512.04844).
    """

    METHOD: ClassVar[str] = "cl_dist.methods.ssu.method:Ssu"
    NEEDS: ClassVar[Collection[Need]] = (
        Need.START,
        Need.PROBE,
    )
    PATHS: ClassVar[tuple[str, ...]] = ("calibration",)
    DATA: ClassVar[tuple[str, ...]] = ("calibration",)

    name: Literal["ssu"]
    """Name of the method."""
    calibration: str
    """File or folder with samples of what the model should keep, from the recipe's folder; read like a task's `path`
    with format auto. The paper takes instructions in the source language."""
    samples: PositiveInt = 500
    """Number of samples to measure (public code: --num_calibration_samples 500), at even distances; all of them if
    there are fewer."""
    keep: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    """Share of a matrix's columns that a task trains (public code: --freeze_ratio 0.5). The number of frozen ones is
    rounded down, as there."""
    inputs: Literal["mean_square", "norm"] = "mean_square"
    """What a column's norm is multiplied by: the mean of its squared inputs, as in the public code, or the root of that
    mean, as in Wanda (arXiv 2306.11695)."""
    vectors: Literal["trained", "frozen"] = "trained"
    """What happens to norms and biases inside the blocks. The public code trains half of each one's elements."""

    def check(self, recipe: Recipe) -> None:
        """Also refuse adapters, which hold nothing of the source."""
        super().check(recipe)
        refuse_adapters(self, recipe)
