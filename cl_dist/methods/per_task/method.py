"""Per-task training: a bound in the field's tables, which does not learn continually."""

from __future__ import annotations

import torch

from cl_dist.config.schema import TrainConfig
from cl_dist.methods.protocol import Method
from cl_dist.methods.shared.kept_weights import KeptWeights
from cl_dist.sharding import ShardView


class PerTask(Method):
    """Every task starts from the weights at the start of the stream (single-task training)."""

    def attach(self, model: torch.nn.Module, shards: ShardView, train: TrainConfig) -> None:
        """Copy the untouched weights, which a resume has here too: it restores the saved state later."""
        self._shards = shards
        self._untouched = KeptWeights(shards)
        self._untouched.keep()

    def start_message(self) -> str:
        """What the copy costs in memory on this rank."""
        return f"per_task: the untouched weights take {4 * self._untouched.elements} bytes of CPU memory on this rank"

    def prepare_task(self, index: int) -> bool:
        """Go back to the untouched weights."""
        self._untouched.put_back()
        self._shards.publish()
        return False
