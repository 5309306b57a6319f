"""Settings of IncLoRA."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from cl_dist.methods.config import Exclusion, MethodConfig, Need, Role, refuse_carried_moments, settings

if TYPE_CHECKING:
    from cl_dist.config.schema import Recipe


@settings
class IncLoraConfig(MethodConfig):
    """IncLoRA: trains new LoRA adapters for every task; those of earlier tasks are frozen and stay active."""

    METHOD: ClassVar[str] = "cl_dist.methods.inclora.method:IncLora"
    NEEDS: ClassVar[Collection[Need]] = (Need.REBUILD,)
    ROLES: ClassVar[Collection[Role]] = (Role.GROWS,)
    EXCLUDES: ClassVar[Sequence[Exclusion]] = (
        Exclusion(Role.GROWS, "both train a new adapter in every task, olora with a penalty; give one of them"),
        Exclusion(
            Role.FUSES,
            "fusion mixes an adapter's weights before and after a task, but here every task has a new adapter",
        ),
        Exclusion(
            Role.ANCHORS,
            "ewc holds back weights that past tasks have trained, but here those are frozen adapters; lwf and agem "
            "compose",
        ),
    )

    name: Literal["inclora"]
    """Name of the method."""

    def check(self, recipe: Recipe) -> None:
        """See `check_growth`."""
        check_growth(self, recipe)


def check_growth(config: MethodConfig, recipe: Recipe) -> None:
    """Raise ValueError if the model has no adapters, or if moments are carried over to new ones."""
    if recipe.model.lora is None:
        raise ValueError(
            f"method: {config.name} trains new LoRA adapters in every task, but there is no model.lora; give one, such "
            "as {r: 8}"
        )
    refuse_carried_moments(config, recipe)
