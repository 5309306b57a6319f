"""Copies of this rank's master weights, and their mixture with others by a number per skill unit."""

from __future__ import annotations

from collections.abc import Callable

import torch

from cl_dist.methods.kif.units import UnitMap, spread
from cl_dist.sharding import Shard, ShardView

Mixture = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(values per element, kept weights, master weights) -> new master weights, all of the same elements."""


class KeptWeights:
    """This rank's float32 master weights of some moment, in CPU memory: never twice on the device.

    Args:
        shards: The engine's shards.
    """

    def __init__(self, shards: ShardView) -> None:
        self._shards = shards
        self.shards = {
            name: Shard(master.start, torch.zeros(master.data.numel(), dtype=torch.float32))
            for name in shards.names
            if (master := shards.master(name)) is not None
        }
        """By parameter name; zeros until `keep`. Parameters of which this rank owns nothing are missing."""

    @property
    def elements(self) -> int:
        """Elements that this rank owns."""
        return sum(shard.data.numel() for shard in self.shards.values())

    def keep(self) -> None:
        """Copy the masters as they are now."""
        for name, kept in self.shards.items():
            kept.data.copy_(self._master(name))

    def put_back(self) -> None:
        """Replace the masters by what was kept; not yet published."""
        for name, kept in self.shards.items():
            self._master(name).copy_(kept.data)

    def swap(self) -> None:
        """Exchange them with the masters, bit for bit; not yet published."""
        for name, kept in self.shards.items():
            master = self._master(name)
            now = master.to(kept.data.device, copy=True)
            master.copy_(kept.data)
            kept.data.copy_(now)

    def mix(self, units: UnitMap, values: torch.Tensor, mixture: Mixture) -> None:
        """Replace the masters by `mixture`; not yet published.

        Args:
            units: The skill units.
            values: `(units,)` float64: one number per unit, given to the mixture once per element as float32.
            mixture: What to make of an element's number, kept weight and master weight.
        """
        for name, kept in self.shards.items():
            part, weights = units.parts[name], self._master(name)
            own = values[part.first : part.first + part.count].to(weights)
            for offset, each in spread(own, part, kept.start, kept.stop):
                new = weights.narrow(0, offset, each.numel())
                new.copy_(mixture(each, kept.data.narrow(0, offset, each.numel()).to(weights.device), new))

    def _master(self, name: str) -> torch.Tensor:
        master = self._shards.master(name)
        assert master is not None  # `shards` names what this rank owns
        return master.data
