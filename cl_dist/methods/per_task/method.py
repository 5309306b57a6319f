"""Every task by itself: a bound of the field's tables, which does not learn continually."""

from __future__ import annotations

import torch

from cl_dist.config.schema import TrainConfig
from cl_dist.methods.protocol import Method
from cl_dist.methods.shared.kept_weights import KeptWeights
from cl_dist.sharding import ShardView


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
