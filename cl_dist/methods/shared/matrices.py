"""Small trainable matrices, whole on every rank, for penalties whose gradient is known in closed form.

A penalty in the loss would be reduced along with the data's gradient, once per micro-batch and in the model's
precision. Instead, its gradient is added to the reduced shards once per step: the same numbers at every stage.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Generic, TypeVar

import torch

from cl_dist.sharding import Shard, ShardView

Kind = TypeVar("Kind", bound=Hashable)


class WholeMatrices(Generic[Kind]):
    """Float32 masters of matrices, stacked by kind and shape: a model has hundreds of matrices, but few shapes.

    Args:
        shards: The engine's shards.
        names: The kind of each matrix, by parameter name.
        device: Where collectives run.
    """

    def __init__(self, shards: ShardView, names: Mapping[str, Kind], device: torch.device) -> None:
        self._shards, self._device = shards, device
        kinds: dict[tuple[Kind, torch.Size], list[str]] = {}
        for name, kind in names.items():
            kinds.setdefault((kind, shards.shape(name)), []).append(name)
        self.kinds: Mapping[tuple[Kind, torch.Size], Sequence[str]] = kinds
        """Names by kind and shape, in the order of the stacks that `gather` returns."""
        self._names = [name for members in kinds.values() for name in members]

    def __len__(self) -> int:
        """Number of matrices."""
        return len(self._names)

    def gather(self) -> dict[tuple[Kind, torch.Size], torch.Tensor]:
        """Copies of the matrices by kind and shape, `(members, rows, columns)` float32 (collective: one all-reduce)."""
        sizes = [self._shards.numel(name) for name in self._names]
        flat = torch.zeros(sum(sizes), device=self._device)
        for name, whole in zip(self._names, flat.split(sizes), strict=True):
            master: Shard | None = self._shards.master(name)
            if master is not None:
                whole[master.start : master.stop] = master.data
        if not self._shards.replicated:
            torch.distributed.all_reduce(flat)
        stacks = [self._shards.numel(members[0]) * len(members) for members in self.kinds.values()]
        parts = zip(self.kinds.items(), flat.split(stacks), strict=True)
        return {key: part.view(len(members), *key[1]) for (key, members), part in parts}

    def add_gradients(self, gradients: Mapping[tuple[Kind, torch.Size], torch.Tensor], factor: float = 1.0) -> None:
        """Add `factor` times the gradients, in the shapes that `gather` returns, to this rank's reduced gradients."""
        for key, stack in gradients.items():
            for name, matrix in zip(self.kinds[key], stack, strict=True):
                shard = self._shards.gradient(name)
                if shard is not None:
                    part = matrix.reshape(-1)[shard.start : shard.stop].to(shard.data.device)
                    shard.data.add_(part, alpha=factor)
                self._shards.gradient_changed(name)
