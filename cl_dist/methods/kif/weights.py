"""Kept weights and new ones, mixed by a number per skill unit."""

from __future__ import annotations

from collections.abc import Callable

import torch

from cl_dist.methods.kif.units import UnitMap, spread
from cl_dist.methods.shared.kept_weights import KeptWeights

Mixture = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(values per element, kept weights, master weights) -> new master weights, all of the same elements."""


class MixedWeights(KeptWeights):
    """Kept weights that are fused with the masters."""

    def mix(self, units: UnitMap, values: torch.Tensor, mixture: Mixture) -> None:
        """Replace the masters by `mixture`; not yet published.

        Args:
            units: The skill units.
            values: `(units,)` float64: one number per unit, given to the mixture once per element as float32.
            mixture: What to make of an element's number, kept weight and master weight.
        """
        for name, kept in self.shards.items():
            part, weights = units.parts[name], self.master(name)
            own = values[part.first : part.first + part.count].to(weights)
            for offset, each in spread(own, part, kept.start, kept.stop):
                new = weights.narrow(0, offset, each.numel())
                new.copy_(mixture(each, kept.data.narrow(0, offset, each.numel()).to(weights.device), new))
