"""Settings of KIF, and what its relatives TaSL and Recurrent-KIF share with it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from cl_dist.config.ranges import Divisor, Fraction, NonNegative, Percent, PositiveInt, Share
from cl_dist.methods.config import Exclusion, Role, VariedConfig, refuse_given, settings

if TYPE_CHECKING:
    from cl_dist.config.schema import Recipe


@settings
class UnitConfig(VariedConfig):
    """What KIF and its relatives share: units, their importance, and the fixed shares of a fusion by masks."""

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
    """What is scored and fused as one: `rank` is one LoRA rank of a module (row of lora_A and column of lora_B),
    `matrix` a whole parameter, `row` one row of a parameter. `auto` (KIF's paper): rank with LoRA, else matrix."""
    order: Literal["first", "second", "mixed"] = "mixed"
    """Importance of an element with weight w and gradient g: `first` is abs(w g), `second` its square, `mixed` (KIF's
    paper) abs(w g - (w g)^2 / 2)."""
    beta1: Fraction = 0.85
    """Share of the old value in the smoothed importance."""
    beta2: Fraction = 0.85
    """Share of the old value in the smoothed deviation from it."""
    importance_at: Literal["before_update", "after_update"] = "before_update"
    """`before_update` (paper): importance is taken from the reduced gradient before clipping and the weights that it
    belongs to. `after_update` (reference code): from the clipped gradient and the weights that the optimiser has
    already updated with it."""
    importance_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision in which importance and deviation are kept between steps; bfloat16 halves their memory."""
    threshold: Percent = 20.0
    """Masks: percentage of the units, from the top, that count as important."""
    weight_new: Share = 0.3
    """Masks: share of the new weights in a unit that is important to old and new; with weight_old it is 1."""
    weight_old: Share = 0.7
    """Masks: share of the old weights in a unit that is important to old and new."""
    weight_neither: Share = 0.5
    """Masks: share of the new weights in a unit that is important to neither."""
    orthogonal: Literal["auto"] | NonNegative = "auto"
    """Weight of the penalty that keeps LoRA's ranks orthogonal; 0 switches it off. `auto` (KIF's paper): 0.1 with LoRA,
    else 0."""
    replay_ratio: Share = 0.0
    """Share of every past task's training samples that is kept and learnt again."""
    keep_unfused: bool = False
    """Also write every task's model as it was before fusion (`unfused/` in the task's folder)."""

    def __post_init__(self) -> None:
        """Refuse shares that do not make a whole."""
        super().__post_init__()
        if abs(self.weight_new + self.weight_old - 1.0) > 1e-9:
            raise ValueError(
                f"weight_new: {self.weight_new} and weight_old {self.weight_old} are not 1 together, so that fusion "
                "would scale the weights"
            )

    @property
    def adds_samples(self) -> bool:
        """Whether there is a memory."""
        return self.replay_ratio > 0

    def check(self, recipe: Recipe) -> None:
        """Refuse a second memory, and settings about LoRA's matrices where there are none, in any task."""
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
        """The units, with `auto` resolved."""
        if self.units != "auto":
            return self.units
        return "rank" if lora else "matrix"

    def orthogonal_for(self, lora: bool) -> float:
        """Weight of the penalty, with `auto` resolved."""
        return (0.1 if lora else 0.0) if self.orthogonal == "auto" else self.orthogonal


@settings
class KifConfig(UnitConfig):
    """KIF: importance of skill units, measured while training, decides how old and new weights are fused after every
    task (arXiv 2408.05200).
    """

    METHOD: ClassVar[str] = "cl_dist.methods.kif.method:Kif"
    VARIED: ClassVar[tuple[str, ...]] = (*UnitConfig.VARIED, "fusion", "tau", "accumulate_new")
    READ_BY: ClassVar[dict[str, tuple[str, ...]]] = {
        "adaptive": ("tau",),
        "hard": ("threshold", "weight_new", "weight_old", "weight_neither"),
    }
    """Settings that one kind of fusion alone reads."""

    name: Literal["kif"]  # the tag that tells the three apart
    """Name of the method."""
    fusion: Literal["adaptive", "hard"] = "adaptive"
    """`adaptive` (paper): shares follow a softmax of the scores; `hard` (TaSL): masks; important units keep their
    side's weights."""
    tau: Divisor = 0.25
    """Temperature of the adaptive fusion: the smaller, the more the larger score decides."""
    accumulate_new: Share = 0.3
    """Share of a task's scores in the accumulated scores; the past keeps the rest."""
    importance_from_step: PositiveInt = 1
    """First step of a task, counted from 1, whose importance is taken; the reference code leaves the first step out
    (2). In a task with fewer steps no unit is more important than another."""
    replay_ratio: Share = 0.0
    """Share of every past task's training samples that is mixed into a task's own (KIF-M, TaSL-M; 0.02 in the papers);
    0: none."""

    def __post_init__(self) -> None:
        """Refuse settings of the other fusion as well."""
        super().__post_init__()
        if self.fusion == "adaptive":
            why = "is not used: fusion: adaptive takes shares from the scores and makes no masks"
            refuse_given(self, why, *self.READ_BY["hard"])
        else:
            refuse_given(self, "is not used: fusion: hard fuses by masks", *self.READ_BY["adaptive"])

    def for_task(self, task: str) -> KifConfig:
        """See `VariedConfig`. Where a task has the other fusion, what only the first one reads has its default."""
        values = self.by_task.get(task, {})
        if values.get("fusion", self.fusion) == self.fusion:
            return super().for_task(task)
        defaults = {name: getattr(type(self), name) for name in self.READ_BY[self.fusion]}
        return replace(self, by_task={}, **{**defaults, **values})

    @classmethod
    def unread(cls, values: Mapping[str, Any]) -> Iterable[str]:
        """What only the other kind of fusion reads."""
        kind = values.get("fusion", cls.fusion)
        return [name for reader, names in cls.READ_BY.items() if reader != kind for name in names]
