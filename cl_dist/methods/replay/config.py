"""Settings of replay."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from cl_dist.config.ranges import PositiveInt
from cl_dist.methods.config import MethodConfig, Role, refuse_given, settings, share_of


@settings
class ReplayConfig(MethodConfig):
    """Replay: mixes samples of past tasks into every task's own."""

    METHOD: ClassVar[str] = "cl_dist.methods.replay.method:Replay"
    ROLES: ClassVar[Collection[Role]] = (Role.REHEARSES,)

    name: Literal["replay"]
    """Name of the method."""
    policy: Literal["quota", "reservoir"] = "quota"
    """`quota`: a share of each past task's samples, so the memory grows with the stream. `reservoir`: a uniform sample
    of all past samples, of fixed size (Algorithm R)."""
    ratio: Annotated[float, Field(gt=0.0, le=1.0)] = 0.02
    """`quota`: share of each past task's training samples to train on again, at least one per task."""
    memory_size: PositiveInt | None = None
    """`reservoir`: number of samples in the memory, over all past tasks; required."""

    def __post_init__(self) -> None:
        """Refuse a reservoir without a size, and settings that only the other policy reads."""
        if self.policy == "reservoir" and self.memory_size is None:
            raise ValueError("memory_size: missing; policy reservoir needs the number of samples that it can hold")
        if self.policy == "quota":
            refuse_given(self, "has a meaning for policy reservoir only; policy quota takes ratio", "memory_size")
        else:
            refuse_given(self, "has a meaning for policy quota only; reservoir takes memory_size", "ratio")

    def samples_per_epoch(self, index: int, counts: Sequence[int]) -> int:
        """The task's own and those in the memory."""
        if self.memory_size is not None:
            return counts[index] + min(self.memory_size, sum(counts[:index]))
        return counts[index] + sum(share_of(count, self.ratio) for count in counts[:index])
