"""Settings of per-task training."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from cl_dist.methods.config import Exclusion, MethodConfig, Need, Role, refuse_carried_moments, settings

if TYPE_CHECKING:
    from cl_dist.config.schema import Recipe


@settings
class PerTaskConfig(MethodConfig):
    """Per-task training, a bound: trains every task separately, from the untouched weights."""

    METHOD: ClassVar[str] = "cl_dist.methods.per_task.method:PerTask"
    NEEDS: ClassVar[Collection[Need]] = (Need.REBUILD,)
    ROLES: ClassVar[Collection[Role]] = (Role.BOUND, Role.SINGLE)
    EXCLUDES: ClassVar[Sequence[Exclusion]] = (
        Exclusion(Role.BOUND, "the one trains every task separately, the other all tasks at once"),
        Exclusion(None, "per_task starts every task from the untouched weights and keeps nothing"),
    )
    # Each row of its accuracy matrix belongs to a model that has seen one task.
    MEANINGLESS: ClassVar[Sequence[str]] = (
        "average_performance",
        "backward_transfer",
        "forgetting",
        "forward_transfer_zero_shot",
    )
    TABLE_NOTE: ClassVar[str | None] = (
        "trains every task separately: its learning accuracy is the bound, and its other metrics have no meaning"
    )

    name: Literal["per_task"]
    """Name of the method."""

    def check(self, recipe: Recipe) -> None:
        """Refuse carried moments, because every task starts from the same weights."""
        refuse_carried_moments(self, recipe)
