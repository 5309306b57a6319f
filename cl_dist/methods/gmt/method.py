"""GMT: only the elements with the largest gradients of the step get one (arXiv 2406.15330)."""

from __future__ import annotations

import torch
from torch import nn

from cl_dist.config.schema import TrainConfig
from cl_dist.methods.cost import RankShare
from cl_dist.methods.elements.method import Elements
from cl_dist.sharding import ElementFilter, ShardView


class Gmt(Elements):
    """Gradient-mask tuning.

    Args:
        config: The method's entry in the recipe.
    """

    def attach(self, model: nn.Module, shards: ShardView, train: TrainConfig) -> None:
        """With `mask: update`, freeze the other elements through the optimiser's step."""
        super().attach(model, shards, train)
        self._keep: dict[str, torch.Tensor] = {}
        updates = self.config.mask == "update"
        self._filter = ElementFilter(shards, self.names, lambda _: self._keep, frozen=True) if updates else None

    def before_update(self) -> None:
        """Zero the gradients of the other elements; the norm is taken and clipped after that."""
        found = {name: self.shards.own_gradient(name) for name in self.names}
        own = {name: shard for name, shard in found.items() if shard is not None}
        cuts = self.largest(own)
        self._keep = {name: cuts[name].keep(shard) for name, shard in own.items()} if self._filter else {}
        for name, cut in cuts.items():
            shard = self.shards.gradient(name)
            if shard is not None:
                shard.data.masked_fill_(~cut.keep(shard), 0)
                self.shards.gradient_changed(name)

    def detach(self) -> None:
        """Remove the hooks from the optimiser."""
        if self._filter is not None:
            self._filter.remove()

    @property
    def stepping_bytes(self) -> int:  # type: ignore[override]
        """With `mask: update`, master and both moments."""
        return 3 * 4 if self.config.mask == "update" else 0

    def score_bytes(self, share: RankShare) -> int:
        """Those of the gradient."""
        return share.gradient_bytes
