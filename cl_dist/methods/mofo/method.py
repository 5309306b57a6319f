"""MoFO: AdamW updates only the elements with the largest first moment (arXiv 2407.20999)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from cl_dist.config.schema import TrainConfig
from cl_dist.methods.elements.method import Elements
from cl_dist.sharding import ElementFilter, Shard, ShardView


class Mofo(Elements):
    """The momentum-filtered optimiser.

    Args:
        config: The method's entry in the recipe.
    """

    searches = 2  # one for the optimiser's group of matrices, one for its group of vectors
    stepping_bytes = 4

    def attach(self, model: nn.Module, shards: ShardView, train: TrainConfig) -> None:
        """Filter what the optimiser does; its moments are known right after it has stepped."""
        super().attach(model, shards, train)
        self._filter = ElementFilter(shards, self.names, self._kept, frozen=False)

    def _kept(self, momentum: Mapping[str, Shard]) -> dict[str, torch.Tensor]:
        cuts = self.largest(momentum)
        return {name: cuts[name].keep(shard) for name, shard in momentum.items()}

    def detach(self) -> None:
        """Remove the hooks from the optimiser."""
        self._filter.remove()
