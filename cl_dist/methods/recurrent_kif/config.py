"""Settings of Recurrent-KIF."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from cl_dist.config.ranges import NonNegative, Positive, PositiveInt, Share
from cl_dist.methods.config import Exclusion, Role, settings
from cl_dist.methods.kif.config import UnitConfig


@settings
class RecurrentKifConfig(UnitConfig):
    """Recurrent-KIF, KIF's successor: steps on the task alternate with steps on a small memory of past tasks, and after
    each such cycle the two changes are fused by the importance of either (arXiv 2502.17510).
    """

    METHOD: ClassVar[str] = "cl_dist.methods.recurrent_kif.method:RecurrentKif"
    EXCLUDES: ClassVar[Sequence[Exclusion]] = (
        *UnitConfig.EXCLUDES,
        Exclusion(Role.REHEARSES, "recurrent_kif has a memory of past samples of its own (replay_ratio)"),
    )
    VARIED: ClassVar[tuple[str, ...]] = (*UnitConfig.VARIED, "outer_learning_rate", "outer_loss_weight")

    name: Literal["recurrent_kif"]
    """Name of the method."""
    inner_steps: PositiveInt = 8
    """Steps on the task's own samples in a cycle."""
    outer_steps: PositiveInt = 4
    """Steps on the memory in a cycle; they come on top of the task's own steps."""
    outer_learning_rate: Positive | None = None
    """Learning rate of the steps on the memory; null: as in the task's own."""
    outer_loss_weight: Positive = 1.0
    """What the loss of the steps on the memory is multiplied by. The reference code divides it by the number of
    micro-batches of a step on the task, although there is one on the memory: 0.25 with its scripts' settings."""
    schedule_over: Literal["all_steps", "inner_steps"] = "all_steps"
    """What train.schedule and train.warmup_steps count: `all_steps`, or `inner_steps` (reference code) the task's own
    alone; steps on the memory then have the rate of the next one."""
    fuse_last_cycle: bool = True
    """Whether a last cycle with fewer than inner_steps own steps has steps on the memory and is fused; the reference
    code does neither (false)."""
    empty_inner_scores: bool = False
    """Start the importance to the task from zero after every cycle (the reference code's scripts do: true); false: it
    goes on from cycle to cycle."""
    empty_outer_scores: bool = False
    """The same for the importance to the past (the reference code's scripts: false)."""
    masks: Literal["units", "elements"] = "units"
    """What the masks of a fusion decide about: whole `units`, or single `elements` (reference code), whose threshold is
    that of all elements of the model together."""
    order: Literal["first", "second", "mixed"] = "first"
    """Importance of an element with weight w and gradient g: `first` (reference code) is abs(w g), `second` its square,
    `mixed` abs(w g - (w g)^2 / 2)."""
    weight_new: Share = 0.4
    """Share of the task's change in a unit that is important to the task and to the past; with weight_old it is 1."""
    weight_old: Share = 0.6
    """Share of the memory's change in a unit that is important to the task and to the past."""
    weight_neither: Share = 0.5
    """Share of the task's change in a unit that is important to neither; the rest is the memory's."""
    orthogonal: Literal["auto"] | NonNegative = 0.0
    """Weight of the penalty that keeps LoRA's ranks orthogonal; 0 (reference code) switches it off, `auto` is 0.1 with
    LoRA."""
    replay_ratio: Annotated[float, Field(gt=0.0, le=1.0)] = 0.02
    """Share of every past task's training samples that makes the memory, at least one of each (paper: 0.02)."""
    keep_unfused: bool = False
    """Also write every task's model as it was before its last fusion (`unfused/` in the task's folder)."""

    def extra_steps(self, steps: int) -> int:
        """Steps on the memory, where the schedule counts them."""
        return self.outer_steps * ceil(steps / self.inner_steps) if self.schedule_over == "all_steps" else 0
