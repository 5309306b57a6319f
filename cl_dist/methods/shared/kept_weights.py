"""Copies of this rank's master weights."""

from __future__ import annotations

import torch

from cl_dist.sharding import Shard, ShardView


class KeptWeights:
    """This rank's float32 master weights at some moment. They stay in CPU memory, never as a second copy on the device.

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
        """By parameter name; zeros until `keep`. Parameters that this rank owns nothing of are missing."""

    @property
    def elements(self) -> int:
        """Elements that this rank owns."""
        return sum(shard.data.numel() for shard in self.shards.values())

    def keep(self) -> None:
        """Copy the current masters."""
        for name, kept in self.shards.items():
            kept.data.copy_(self.master(name))

    def put_back(self) -> None:
        """Restore the kept weights into the masters, without publishing them."""
        for name, kept in self.shards.items():
            self.master(name).copy_(kept.data)

    def swap(self) -> None:
        """Exchange the kept weights and the masters, bit for bit, without publishing them."""
        for name, kept in self.shards.items():
            master = self.master(name)
            now = master.to(kept.data.device, copy=True)
            master.copy_(kept.data)
            kept.data.copy_(now)

    def master(self, name: str) -> torch.Tensor:
        """The master weights of a parameter in `shards`."""
        master = self._shards.master(name)
        assert master is not None  # `shards` names what this rank owns
        return master.data
