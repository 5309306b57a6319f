"""All tasks together: a bound of the field's tables, which does not learn continually."""

from __future__ import annotations

from collections.abc import Sequence

from cl_dist.methods.protocol import Method
from cl_dist.tasks.types import Encoded


class MultiTask(Method):
    """All tasks are learnt together in the place of the first one; the others have no steps of their own."""

    def training_data(self, index: int, tasks: Sequence[Sequence[Encoded]]) -> list[Encoded]:
        """The samples of all tasks behind the first."""
        return [sample for task in tasks[1:] for sample in task] if index == 0 else []

    def trains(self, index: int) -> bool:
        """In the first task everything is learnt."""
        return index == 0
