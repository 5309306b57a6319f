"""Settings of EWC."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, ClassVar, Literal

from cl_dist.config.ranges import NonNegative, PositiveInt, Share
from cl_dist.methods.config import Need, Role, VariedConfig, refuse_given, settings

if TYPE_CHECKING:
    from cl_dist.config.schema import Recipe


@settings
class EwcConfig(VariedConfig):
    """EWC, elastic weight consolidation: a quadratic penalty holds back the weights that mattered to past tasks (arXiv
    1612.00796).
    """

    METHOD: ClassVar[str] = "cl_dist.methods.ewc.method:Ewc"
    NEEDS: ClassVar[Collection[Need]] = (Need.PROBE,)
    ROLES: ClassVar[Collection[Role]] = (Role.ANCHORS,)
    VARIED: ClassVar[tuple[str, ...]] = ("weight",)

    name: Literal["ewc"]
    """Name of the method."""
    weight: NonNegative = 1.0
    """Weight lambda of the penalty `lambda / 2 * sum F (theta - anchor)^2`, relative to the mean loss per target. 1 is
    what Bayes' rule gives for tasks with equally many samples and one target per sample; larger values are common."""
    variant: Literal["separate", "online"] = "separate"
    """`separate` (paper): one penalty per past task, stored as their sum. `online` (Schwarz et al. 2018): a single
    penalty, anchored at the latest task's weights, whose Fisher information decays."""
    gamma: Share = 0.95
    """`online`: factor by which the past Fisher information decays when a task's is added."""
    fisher_samples: PositiveInt | None = 128
    """Number of a task's training samples, drawn with the seed, to measure its Fisher information on; null: all."""
    fisher_batch: PositiveInt = 1
    """Number of samples whose gradients are summed before squaring; at most a global batch. 1 is exact. More are
    faster, and give the same expectation if the samples' gradients have zero mean."""

    def __post_init__(self) -> None:
        """Refuse a decay that nothing would read. The default passes, because a run's config.yaml contains it."""
        super().__post_init__()
        if self.variant == "separate":
            refuse_given(self, "has a meaning for variant online only; separate forgets nothing", "gamma")

    def check(self, recipe: Recipe) -> None:
        """Refuse an order in which the anchor would be the weights before a fusion, from which no task starts."""
        later = recipe.method[recipe.method.index(self) + 1 :]
        fusing = next((method.name for method in later if Role.FUSES in method.ROLES), None)
        if fusing is not None:
            raise ValueError(
                f"method: ewc before {fusing} would hold on to the weights before the fusion and undo it; "
                f"give {fusing} first"
            )
