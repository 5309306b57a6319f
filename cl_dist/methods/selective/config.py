"""Settings that all methods share which choose once per task what is trained."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from cl_dist.methods.config import Exclusion, MethodConfig, Need, Role, refuse_carried_moments, settings

if TYPE_CHECKING:
    from cl_dist.config.schema import Recipe


@settings
class SelectiveConfig(MethodConfig):
    """A part of the weights is trained, chosen for a whole task; the rest has neither gradient nor optimiser state."""

    ROLES: ClassVar[Collection[Role]] = (Role.SELECTS,)
    NEEDS: ClassVar[Collection[Need]] = (Need.START,)
    EXCLUDES: ClassVar[Sequence[Exclusion]] = (
        Exclusion(Role.SELECTS, "each of them chooses which part of the weights is trained; give one of them"),
        Exclusion(Role.FUSES, "fusion needs the gradient of every weight, and here what is not trained has none"),
        Exclusion(Role.ANCHORS, "ewc needs the gradient of every weight, and here what is not trained has none"),
        Exclusion(
            Role.GROWS, "new adapters are trained as a whole, and old ones are frozen; nothing is left to choose"
        ),
    )

    name: Literal["given", "hft", "s2ft", "sift", "ssu"]
    """Name of the method."""

    def check(self, recipe: Recipe) -> None:
        """Refuse AdamW's moments in a task that trains another part of the weights, and methods before this one."""
        refuse_carried_moments(self, recipe)
        first = recipe.method[0].name
        if first != self.name:
            raise ValueError(
                f"method: {self.name} has to come before {first}, which would otherwise measure a model whose trained "
                f"part is not chosen yet; allowed: [{self.name}, {first}]"
            )


def refuse_adapters(config: MethodConfig, recipe: Recipe) -> None:
    """Raise ValueError if adapters are trained instead of the model's own weights."""
    if recipe.model.lora is not None:
        raise ValueError(
            f"method: {config.name} chooses among the model's own weights, which model.lora freezes; allowed: full "
            "fine-tuning"
        )
