"""Settings of Recurrent-KIF."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from math import ceil
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from cl_dist.config.ranges import NonNegative, Positive, PositiveInt, Share
from cl_dist.methods.config import Exclusion, Need, Role, settings
from cl_dist.methods.kif.config import UnitConfig


@settings
class RecurrentKifConfig(UnitConfig):
    """Recurrent-KIF, KIF's successor: alternates steps on the task with steps on a small memory of past tasks, and
    fuses the two changes by importance after each cycle (arXiv 2502.17510).
    """

    METHOD: ClassVar[str] = "cl_dist.methods.recurrent_kif.method:RecurrentKif"
    NEEDS: ClassVar[Collection[Need]] = (Need.SAMPLES,)
    EXCLUDES: ClassVar[Sequence[Exclusion]] = (
        *UnitConfig.EXCLUDES,
        Exclusion(Role.REHEARSES, "recurrent_kif has a memory of past samples itself (replay_ratio)"),
    )
    VARIED: ClassVar[tuple[str, ...]] = (*UnitConfig.VARIED, "outer_learning_rate", "outer_loss_weight")

    name: Literal["recurrent_kif"]
    """Name of the method."""
    inner_steps: PositiveInt = 8
    """Steps on the task's own samples in each cycle."""
    outer_steps: PositiveInt = 4
    """Steps on the memory in each cycle, in addition to the task's own steps."""
    outer_learning_rate: Positive | None = None
    """Learning rate of the steps on the memory; null: the same as for the task's own steps."""
    outer_loss_weight: Positive = 1.0
    """Factor on the loss of the steps on the memory. The reference code divides that loss by the number of
    micro-batches in a step on the task, although a step on the memory has only one: 0.25 with its scripts'
    settings."""
    schedule_over: Literal["all_steps", "inner_steps"] = "all_steps"
    """Steps that train.schedule and train.warmup_steps count: `all_steps`, or `inner_steps` (reference code), only the
    task's own. Steps on the memory then use the learning rate of the next own step."""
    fuse_last_cycle: bool = True
    """Whether a last cycle with fewer than inner_steps own steps also has steps on the memory and is fused; the
    reference code does neither (false)."""
    empty_inner_scores: bool = False
    """Reset the importance to the task after every cycle, as the reference code's scripts do (true); false: it carries
    over from cycle to cycle."""
    empty_outer_scores: bool = False
    """The same for the importance to the past (reference code's scripts: false)."""
    masks: Literal["units", "elements"] = "units"
    """What a fusion's masks select: whole `units`, or single `elements` (reference code), with one threshold over all
    elements of the model."""
    order: Literal["first", "second", "mixed"] = "first"
    """Importance of an element with weight w and gradient g: `first` (reference code) is abs(w g), `second` its square,
    `mixed` abs(w g - (w g)^2 / 2)."""
    weight_new: Share = 0.4
    """Share of the task's change in units that are important to task and past; weight_new + weight_old = 1."""
    weight_old: Share = 0.6
    """Share of the memory's change in units that are important to task and past."""
    weight_neither: Share = 0.5
    """Share of the task's change in units that are important to neither; the rest is the memory's."""
    orthogonal: Literal["auto"] | NonNegative = 0.0
    """Weight of the penalty that keeps LoRA's ranks orthogonal; 0 (reference code) turns it off, `auto` is 0.1 with
    LoRA."""
    replay_ratio: Annotated[float, Field(gt=0.0, le=1.0)] = 0.02
    """Share of each past task's training samples in the memory, at least one per task (paper: 0.02)."""
    keep_unfused: bool = False
    """Also save each task's model as it was before its last fusion (`unfused/` in the task's folder)."""

    def samples_per_epoch(self, index: int, counts: Sequence[int]) -> int:
        """The task's own; the memory has steps of its own."""
        return counts[index]

    def memory_steps(self, steps: int) -> int:
        """`outer_steps` after all `inner_steps` own ones, and after the last ones too (`fuse_last_cycle`)."""
        cycles = ceil(steps / self.inner_steps) if self.fuse_last_cycle else steps // self.inner_steps
        return self.outer_steps * cycles

    def extra_steps(self, steps: int) -> int:
        """Steps on the memory, if the schedule counts them."""
        return self.outer_steps * ceil(steps / self.inner_steps) if self.schedule_over == "all_steps" else 0
