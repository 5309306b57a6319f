"""Multi-task training: a bound in the field's tables, which does not learn continually."""

from __future__ import annotations

from collections.abc import Sequence

from cl_dist.methods.protocol import Method
from cl_dist.tasks.samples import Samples, join
from cl_dist.tasks.types import Encoded


class MultiTask(Method):
    """Trains on all tasks together in place of the first one; the others have no steps."""

    def training_data(self, index: int, tasks: Sequence[Sequence[Encoded]]) -> Samples:
        """For the first task, the samples of all others."""
        return join(tasks[1:] if index == 0 else [])

    def trains(self, index: int) -> bool:
        """True for the first task only."""
        return index == 0
