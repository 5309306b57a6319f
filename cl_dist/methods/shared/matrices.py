"""Small trainable matrices, whole on every rank, for penalties whose gradient is known in closed form.

A penalty in the loss would be reduced with the data's gradient, once per micro-batch and in the model's precision. Its
own gradient is added once a step to the reduced shards: the same number at every stage.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Generic, TypeVar

import torch

from cl_dist.sharding import Shard, ShardView

Kind = TypeVar("Kind", bound=Hashable)


class WholeMatrices(Generic[Kind]):
    """Float32 masters of matrices, those of one kind and shape side by side: a model has hundreds, and few shapes.

    Args:
        shards: The engine's shards.
        names: Each matrix by its parameter's name, with the kind that it is of.
        device: Where collectives run.
    """

    def __init__(self, shards: ShardView, names: Mapping[str, Kind], device: torch.device) -> None:
        self._shards, self._device = shards, device
        kinds: dict[tuple[Kind, torch.Size], list[str]] = {}
        for name, kind in names.items():
            kinds.setdefault((kind, shards.shape(name)), []).append(name)
        self.kinds: Mapping[tuple[Kind, torch.Size], Sequence[str]] = kinds
        """Names by kind and shape, in the order of the stacks that `gather` gives."""
        self._names = [name for members in kinds.values() for name in members]

    def __len__(self) -> int:
        """Number of matrices."""
        return len(self._names)

    def gather(self) -> dict[tuple[Kind, torch.Size], torch.Tensor]:
        """Every kind's matrices, `(members, rows, columns)` float32, copies (collective: one all-reduce)."""
        flat = torch.zeros(sum(self._shards.numel(name) for name in self._names), device=self._device)
        for name, whole in zip(self._names, flat.split(self._sizes()), strict=True):
            master: Shard | None = self._shards.master(name)
            if master is not None:
                whole[master.start : master.stop] = master.data
        if not self._shards.replicated:
            torch.distributed.all_reduce(flat)
        sizes = [self._shards.numel(members[0]) * len(members) for members in self.kinds.values()]
        parts = zip(self.kinds.items(), flat.split(sizes), strict=True)
        return {key: part.view(len(members), *key[1]) for (key, members), part in parts}

    def add_gradients(self, gradients: Mapping[tuple[Kind, torch.Size], torch.Tensor], factor: float = 1.0) -> None:
        """Add `factor` times the gradients, shaped as `gather` gives the matrices, to this rank's reduced gradients."""
        for key, stack in gradients.items():
            for name, matrix in zip(self.kinds[key], stack, strict=True):
                shard = self._shards.gradient(name)
                if shard is not None:
                    part = matrix.reshape(-1)[shard.start : shard.stop].to(shard.data.device)
                    shard.data.add_(part, alpha=factor)
                self._shards.gradient_changed(name)

    def _sizes(self) -> list[int]:
        return [self._shards.numel(name) for name in self._names]
