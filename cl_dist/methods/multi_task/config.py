"""Settings of multi-task training."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from cl_dist.methods.config import Exclusion, MethodConfig, Role, settings

if TYPE_CHECKING:
    from cl_dist.config.schema import Recipe


@settings
class MultiTaskConfig(MethodConfig):
    """Multi-task training, a bound: all tasks together, in the place of the first one."""

    METHOD: ClassVar[str] = "cl_dist.methods.multi_task.method:MultiTask"
    ROLES: ClassVar[Collection[Role]] = (Role.BOUND,)
    EXCLUDES: ClassVar[Sequence[Exclusion]] = (
        Exclusion(None, "multi_task learns all tasks at once, so that no task has a past"),
    )
    # It learns all tasks before the first of them is scored.
    MEANINGLESS: ClassVar[Sequence[str]] = ("forward_transfer_zero_shot",)

    name: Literal["multi_task"]
    """Name of the method."""

    @property
    def adds_samples(self) -> bool:
        """The first task has the samples of all."""
        return True

    def check(self, recipe: Recipe) -> None:
        """Refuse different numbers of passes over the tasks' samples, and moments that no task follows to take up."""
        epochs = {task.name: task.epochs or recipe.train.epochs for task in recipe.stream.tasks}
        if len(set(epochs.values())) > 1:
            told = ", ".join(f"{name} {count}" for name, count in epochs.items())
            raise ValueError(
                f"stream.tasks: multi_task learns all tasks together, and their epochs differ ({told}); give all the "
                "same number, such as by train.epochs alone"
            )
        if recipe.train.keep_optimizer:
            raise ValueError("train.keep_optimizer: true is not used: multi_task trains once, and no task follows")
