"""Settings of KIF, and those that TaSL and Recurrent-KIF share with it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from cl_dist.config.ranges import Divisor, Fraction, NonNegative, Percent, PositiveInt, Share
from cl_dist.methods.config import Exclusion, Role, VariedConfig, refuse_given, settings, share_of

if TYPE_CHECKING:
    from cl_dist.config.schema import Recipe


@settings
class UnitConfig(VariedConfig):
    """Settings that KIF, TaSL and Recurrent-KIF share: units, their importance, and the shares of a fusion by masks."""

    VARIED: ClassVar[tuple[str, ...]] = (
        "order",
        "beta1",
        "beta2",
        "threshold",
        "weight_new",
        "weight_old",
        "weight_neither",
        "orthogonal",
    )

    ROLES: ClassVar[Collection[Role]] = (Role.FUSES,)
    EXCLUDES: ClassVar[Sequence[Exclusion]] = (
        Exclusion(Role.FUSES, "kif, tasl and recurrent_kif all fuse weights; give one of them"),
    )

    name: Literal["kif", "tasl", "recurrent_kif"]
    """Name of the method."""
    units: Literal["auto", "matrix", "rank", "row"] = "auto"
    """What is scored and fused as one unit: `rank` is one LoRA rank of a module (row of lora_A and column of lora_B),
    `matrix` a whole parameter, `row` one row of a parameter. `auto` (KIF's paper): rank with LoRA, otherwise
    matrix."""
    order: Literal["first", "second", "mixed"] = "mixed"
    """Importance of an element with weight w and gradient g: `first` is abs(w g), `second` its square, `mixed` (KIF's
    paper) abs(w g - (w g)^2 / 2)."""
    beta1: Fraction = 0.85
    """Weight of the old value in the smoothed importance."""
    beta2: Fraction = 0.85
    """Weight of the old value in the smoothed deviation from that importance."""
    importance_at: Literal["before_update", "after_update"] = "before_update"
    """`before_update` (paper): compute importance from the reduced gradient before clipping and the weights at which it
    was taken. `after_update` (reference code): from the clipped gradient and the weights that the optimiser has just
    updated with it."""
    importance_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision in which importance and deviation are stored between steps; bfloat16 halves their memory."""
    threshold: Percent = 20.0
    """Masks: percentage of the units, from the top, that count as important."""
    weight_new: Share = 0.3
    """Masks: share of the new weights in units that are important to old and new; weight_new + weight_old = 1."""
    weight_old: Share = 0.7
    """Masks: share of the old weights in units that are important to old and new."""
    weight_neither: Share = 0.5
    """Masks: share of the new weights in units that are important to neither."""
    orthogonal: Literal["auto"] | NonNegative = "auto"
    """Weight of the penalty that keeps LoRA's ranks orthogonal; 0 turns it off. `auto` (KIF's paper): 0.1 with LoRA,
    otherwise 0."""
    replay_ratio: Share = 0.0
    """Share of each past task's training samples to keep and train on again."""
    keep_unfused: bool = False
    """Also save each task's model as it was before fusion (`unfused/` in the task's folder)."""

    def __post_init__(self) -> None:
        """Refuse shares that do not add up to 1."""
        super().__post_init__()
        if abs(self.weight_new + self.weight_old - 1.0) > 1e-9:
            raise ValueError(
                f"weight_new: {self.weight_new} and weight_old {self.weight_old} do not add up to 1, so fusion would "
                "scale the weights"
            )

    @property
    def adds_samples(self) -> bool:
        """Whether past samples are replayed."""
        return self.replay_ratio > 0

    def samples_per_epoch(self, index: int, counts: Sequence[int]) -> int:
        """The task's own and those in the memory."""
        return counts[index] + sum(share_of(count, self.replay_ratio) for count in counts[:index])

    def check(self, recipe: Recipe) -> None:
        """Refuse a second replay memory, and settings for LoRA's matrices without model.lora, in any task."""
        for config in (self, *map(self.for_task, self.by_task)):
            config._check(recipe)

    def _check(self, recipe: Recipe) -> None:
        rehearsing = next((other.name for other in recipe.method if Role.REHEARSES in other.ROLES), None)
        if self.replay_ratio > 0 and rehearsing is not None:
            raise ValueError(
                f"method: {rehearsing} and {self.name} with replay_ratio {self.replay_ratio} do not compose: both "
                "mix past samples in; give one of them"
            )
        if recipe.model.lora is None and self.units == "rank":
            raise ValueError("method.units: rank is a rank of LoRA, and there is no model.lora; give matrix or row")
        if recipe.model.lora is None and self.orthogonal_for(lora=False) > 0:
            raise ValueError(
                f"method.orthogonal: {self.orthogonal} weighs a penalty on LoRA's matrices, and there is no "
                "model.lora; give 0"
            )

    def units_for(self, lora: bool) -> Literal["matrix", "rank", "row"]:
        """`units`, with `auto` resolved."""
        if self.units != "auto":
            return self.units
        return "rank" if lora else "matrix"

    def orthogonal_for(self, lora: bool) -> float:
        """`orthogonal`, with `auto` resolved."""
        return (0.1 if lora else 0.0) if self.orthogonal == "auto" else self.orthogonal


@settings
class KifConfig(UnitConfig):
    """KIF: fuses old and new weights after each task, by the importance of skill units, measured during training
    (arXiv 2408.05200).
    """

    METHOD: ClassVar[str] = "cl_dist.methods.kif.method:Kif"
    VARIED: ClassVar[tuple[str, ...]] = (*UnitConfig.VARIED, "fusion", "tau", "accumulate_new")
    READ_BY: ClassVar[dict[str, tuple[str, ...]]] = {
        "adaptive": ("tau",),
        "hard": ("threshold", "weight_new", "weight_old", "weight_neither"),
    }
    """Settings that only one kind of fusion reads."""

    name: Literal["kif"]
    """Name of the method."""
    fusion: Literal["adaptive", "hard"] = "adaptive"
    """`adaptive` (paper): shares are a softmax of the scores. `hard` (TaSL): masks; a unit that is important to one
    side alone keeps that side's weights."""
    tau: Divisor = 0.25
    """Temperature of the adaptive fusion: the smaller it is, the more the larger score dominates."""
    accumulate_new: Share = 0.3
    """Weight of a task's scores in the accumulated scores; the past has the rest."""
    importance_from_step: PositiveInt = 1
    """First step of a task, counted from 1, whose importance counts; the reference code leaves out the first step (2).
    In a task with fewer steps, all units are equally important."""
    replay_ratio: Share = 0.0
    """Share of each past task's training samples to mix into a task's own (KIF-M, TaSL-M; 0.02 in the papers); 0:
    none."""

    def __post_init__(self) -> None:
        """Also refuse settings that only the other kind of fusion reads."""
        super().__post_init__()
        if self.fusion == "adaptive":
            why = "is not used: fusion: adaptive takes shares from the scores and makes no masks"
            refuse_given(self, why, *self.READ_BY["hard"])
        else:
            refuse_given(self, "is not used: fusion: hard fuses by masks", *self.READ_BY["adaptive"])

    def for_task(self, task: str) -> KifConfig:
        """See `VariedConfig`. If the task has the other fusion, settings for the first one return to defaults."""
        values = self.by_task.get(task, {})
        if values.get("fusion", self.fusion) == self.fusion:
            return super().for_task(task)
        defaults = {name: getattr(type(self), name) for name in self.READ_BY[self.fusion]}
        return replace(self, by_task={}, **{**defaults, **values})

    @classmethod
    def unread(cls, values: Mapping[str, Any]) -> Iterable[str]:
        """Settings that only the other kind of fusion reads."""
        kind = values.get("fusion", cls.fusion)
        return [name for reader, names in cls.READ_BY.items() if reader != kind for name in names]
