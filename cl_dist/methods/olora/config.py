"""Settings of O-LoRA."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from cl_dist.config.ranges import NonNegative
from cl_dist.methods.config import Exclusion, Need, Role, VariedConfig, settings
from cl_dist.methods.inclora.config import IncLoraConfig, check_growth

if TYPE_CHECKING:
    from cl_dist.config.schema import Recipe


@settings
class OLoraConfig(VariedConfig):
    """O-LoRA: IncLoRA with a penalty that keeps new adapters orthogonal to old ones (arXiv 2310.14152)."""

    METHOD: ClassVar[str] = "cl_dist.methods.olora.method:OLora"
    NEEDS: ClassVar[Collection[Need]] = (Need.REBUILD,)
    ROLES: ClassVar[Collection[Role]] = IncLoraConfig.ROLES
    EXCLUDES: ClassVar[Sequence[Exclusion]] = IncLoraConfig.EXCLUDES
    VARIED: ClassVar[tuple[str, ...]] = ("lambda1", "lambda2")

    name: Literal["olora"]
    """Name of the method."""
    lambda1: NonNegative = 0.5
    """Weight of the penalty sum(abs(A_old A_new^T)) over all modules and old adapters (reference code: 0.5; on the long
    benchmark 0, 0.5 or 5, depending on the task: see `by_task`)."""
    lambda2: NonNegative = 0.0
    """Weight of the sum of the norms of the new lora_A and lora_B (reference code: 0; on the long benchmark 0, 0.1 or
    0.3, depending on the task)."""

    def check(self, recipe: Recipe) -> None:
        """The same conditions as for IncLoRA."""
        check_growth(self, recipe)
