"""The penalty that keeps LoRA's ranks orthogonal, as a gradient that is added to the shards (KIF, arXiv 2408.05200)."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from cl_dist.methods.kif.units import LORA_A, LORA_B
from cl_dist.sharding import Shard, ShardView


class Orthogonality:
    """`strength * mean over LoRA matrices of ||A A^T - I||_F` (for lora_B `||B^T B - I||_F`), on the float32 masters.

    A penalty in the loss would be reduced with the data's gradient, once per micro-batch and in the model's precision.
    Its own gradient is known in closed form, and is added once a step to the reduced shards: the same number at every
    stage. The matrices, small ones, are put together on every rank by one all-reduce of the masters' pieces.

    Args:
        shards: The engine's shards.
        strength: The penalty's weight (lambda).
        device: Where collectives run.
    """

    def __init__(self, shards: ShardView, strength: float, device: torch.device) -> None:
        self._shards, self._strength, self._device = shards, strength, device
        names = [name for name in shards.names if _is_lora_matrix(name, shards)] if strength > 0 else []
        # Matrices of one kind and shape side by side: a model has hundreds of small ones, and few shapes.
        kinds: dict[tuple[bool, torch.Size], list[str]] = {}
        for name in names:
            kinds.setdefault((LORA_A in name, shards.shape(name)), []).append(name)
        self._kinds = kinds
        self._names = [name for members in kinds.values() for name in members]

    @torch.no_grad()
    def add_gradient(self) -> None:
        """Add the penalty's gradient to the reduced gradients (collective)."""
        if not self._names:
            return
        flat = self._gathered()
        sizes = [self._shards.numel(members[0]) * len(members) for members in self._kinds.values()]
        for part, ((is_a, shape), members) in zip(flat.split(sizes), self._kinds.items(), strict=True):
            matrices = part.view(len(members), *shape)
            matrices.copy_(_norm_gradients(matrices) if is_a else _norm_gradients(matrices.mT).mT)
        for name, own in self._pieces(flat):
            shard = self._shards.gradient(name)
            if shard is not None:
                part = own[shard.start : shard.stop].to(shard.data.device)
                shard.data.add_(part, alpha=self._strength / len(self._names))
            self._shards.gradient_changed(name)

    def _gathered(self) -> torch.Tensor:
        """Every LoRA matrix, whole, flattened one after the other."""
        flat = torch.zeros(sum(self._shards.numel(name) for name in self._names), device=self._device)
        for name, whole in self._pieces(flat):
            master: Shard | None = self._shards.master(name)
            if master is not None:
                whole[master.start : master.stop] = master.data
        if not self._shards.replicated:
            torch.distributed.all_reduce(flat)
        return flat

    def _pieces(self, flat: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        sizes = [self._shards.numel(name) for name in self._names]
        return zip(self._names, flat.split(sizes), strict=True)


def _norm_gradients(matrices: torch.Tensor) -> torch.Tensor:
    """Gradient of ||M||_F with M = A A^T - I for each A of `(count, r, n)`: 2 M A / ||M||_F; zero where A is
    orthonormal.
    """
    gram = matrices @ matrices.mT
    gram.diagonal(dim1=1, dim2=2).sub_(1.0)
    norm = torch.linalg.matrix_norm(gram, keepdim=True)
    return torch.where(norm > 0, 2.0 * (gram @ matrices) / norm, 0.0)


def _is_lora_matrix(name: str, shards: ShardView) -> bool:
    return (LORA_A in name or LORA_B in name) and len(shards.shape(name)) == 2
