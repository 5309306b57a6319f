"""Settings of EWC."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, ClassVar, Literal

from cl_dist.config.ranges import NonNegative, PositiveInt, Share
from cl_dist.methods.config import Role, VariedConfig, refuse_given, settings

if TYPE_CHECKING:
    from cl_dist.config.schema import Recipe


@settings
class EwcConfig(VariedConfig):
    """EWC, elastic weight consolidation: a quadratic penalty holds back the weights that mattered to past tasks (arXiv
    1612.00796).
    """

    METHOD: ClassVar[str] = "cl_dist.methods.ewc.method:Ewc"
    ROLES: ClassVar[Collection[Role]] = (Role.ANCHORS,)
    VARIED: ClassVar[tuple[str, ...]] = ("weight",)

    name: Literal["ewc"]
    """Name of the method."""
    weight: NonNegative = 1.0
    """Weight lambda of the penalty, `lambda / 2 * sum F (theta - anchor)^2`, beside the mean loss per target. 1 is what
    Bayes' rule says for tasks of equally many samples with one target each; larger ones are common."""
    variant: Literal["separate", "online"] = "separate"
    """`separate` (paper): a penalty for every past task, of which the sum is kept. `online` (Schwarz et al. 2018): one
    penalty, whose anchor is the newest weights and whose Fisher information decays."""
    gamma: Share = 0.95
    """`online`: what is left of the past's Fisher information when a task's is added."""
    fisher_samples: PositiveInt | None = 128
    """Training samples of a task, drawn by the seed, that its Fisher information is measured on; null: all."""
    fisher_batch: PositiveInt = 1
    """Samples whose gradients are added before they are squared. 1 is exact. More are measured at once, which takes the
    place of the Fisher information where the samples' gradients have the mean zero; at most a global batch."""

    def __post_init__(self) -> None:
        """Refuse a decay that nothing would read; the default passes, since a run's config.yaml spells it out."""
        super().__post_init__()
        if self.variant == "separate":
            refuse_given(self, "has a meaning for variant online only; separate forgets nothing", "gamma")

    def check(self, recipe: Recipe) -> None:
        """What is held on to must be what the next task starts from: the weights after a fusion, not before it."""
        later = recipe.method[recipe.method.index(self) + 1 :]
        fusing = next((method.name for method in later if Role.FUSES in method.ROLES), None)
        if fusing is not None:
            raise ValueError(
                f"method: ewc before {fusing} would hold on to the weights before the fusion and undo it; "
                f"give {fusing} first"
            )
