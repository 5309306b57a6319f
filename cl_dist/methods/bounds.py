"""The bounds of the field's tables: every task by itself, and all tasks together. Neither learns continually."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cl_dist.config.schema import TrainConfig
from cl_dist.methods.base import Method
from cl_dist.methods.kif.weights import KeptWeights
from cl_dist.sharding import ShardView
from cl_dist.tasks.types import Encoded


class PerTask(Method):
    """Every task starts from the weights that the stream starts from (single-task training)."""

    def attach(self, model: torch.nn.Module, shards: ShardView, train: TrainConfig) -> None:
        """Keep the untouched weights. They follow from the recipe, also after a resume, which is filled in later."""
        self._shards = shards
        self._untouched = KeptWeights(shards)
        self._untouched.keep()

    def start_message(self) -> str:
        """The memory that they take."""
        return f"per_task: the untouched weights take {4 * self._untouched.elements} bytes of CPU memory on this rank"

    def prepare_task(self, index: int) -> bool:
        """Forget what earlier tasks have taught."""
        self._untouched.put_back()
        self._shards.publish()
        return False


class MultiTask(Method):
    """All tasks are learnt together in the place of the first one; the others have no steps of their own."""

    def training_data(self, index: int, tasks: Sequence[Sequence[Encoded]]) -> list[Encoded]:
        """The samples of all tasks behind the first."""
        return [sample for task in tasks[1:] for sample in task] if index == 0 else []

    def trains(self, index: int) -> bool:
        """In the first task everything is learnt."""
        return index == 0
