"""Settings of multi-task training."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from cl_dist.methods.config import Exclusion, MethodConfig, Role, settings

if TYPE_CHECKING:
    from cl_dist.config.schema import Recipe


@settings
class MultiTaskConfig(MethodConfig):
    """Multi-task training, a bound: trains all tasks together, in place of the first one."""

    METHOD: ClassVar[str] = "cl_dist.methods.multi_task.method:MultiTask"
    ROLES: ClassVar[Collection[Role]] = (Role.BOUND,)
    EXCLUDES: ClassVar[Sequence[Exclusion]] = (
        Exclusion(None, "multi_task learns all tasks at once, so no task has a past"),
    )
    # All tasks have been trained before the first score is measured.
    MEANINGLESS: ClassVar[Sequence[str]] = ("forward_transfer_zero_shot",)

    name: Literal["multi_task"]
    """Name of the method."""

    @property
    def adds_samples(self) -> bool:
        """The first task trains on the samples of all tasks."""
        return True

    def samples_per_epoch(self, index: int, counts: Sequence[int]) -> int:
        """All of them in place of the first task."""
        return sum(counts) if index == 0 else 0

    def check(self, recipe: Recipe) -> None:
        """Refuse tasks with different numbers of epochs, and carried moments, which no later task could use."""
        epochs = {task.name: task.epochs or recipe.train.epochs for task in recipe.stream.tasks}
        if len(set(epochs.values())) > 1:
            differing = ", ".join(f"{name} {count}" for name, count in epochs.items())
            raise ValueError(
                f"stream.tasks: multi_task learns all tasks together, and their epochs differ ({differing}); give "
                "all the same number, for example with train.epochs alone"
            )
        if recipe.train.keep_optimizer:
            raise ValueError("train.keep_optimizer: true is not used: multi_task trains once, and no task follows")
