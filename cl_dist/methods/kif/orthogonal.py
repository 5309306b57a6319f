"""The penalty that keeps LoRA's ranks orthogonal, as a gradient that is added to the shards (KIF, arXiv 2408.05200)."""

from __future__ import annotations

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
        self._names = [name for name in shards.names if _is_lora_matrix(name, shards)] if strength > 0 else []

    @torch.no_grad()
    def add_gradient(self) -> None:
        """Add the penalty's gradient to the reduced gradients (collective)."""
        if not self._names:
            return
        for name, weight in self._gathered().items():
            shard = self._shards.gradient(name)
            if shard is not None:
                own = self._gradient(name, weight).view(-1)[shard.start : shard.stop]
                shard.data.add_(own.to(shard.data.device), alpha=self._strength / len(self._names))
            self._shards.gradient_changed(name)

    def _gathered(self) -> dict[str, torch.Tensor]:
        """Every LoRA matrix, whole, in its own shape."""
        sizes = [self._shards.numel(name) for name in self._names]
        flat = torch.zeros(sum(sizes), device=self._device)
        for name, whole in zip(self._names, flat.split(sizes), strict=True):
            master: Shard | None = self._shards.master(name)
            if master is not None:
                whole[master.start : master.stop] = master.data
        if not self._shards.replicated:
            torch.distributed.all_reduce(flat)
        pieces = zip(self._names, flat.split(sizes), strict=True)
        return {name: whole.view(self._shards.shape(name)) for name, whole in pieces}

    def _gradient(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """Gradient of the norm for one matrix."""
        return _norm_gradient(weight) if LORA_A in name else _norm_gradient(weight.T).T.contiguous()


def _norm_gradient(matrix: torch.Tensor) -> torch.Tensor:
    """Gradient of ||M||_F with M = A A^T - I for A `(r, n)`: 2 M A / ||M||_F; zero where A is orthonormal."""
    gram = matrix @ matrix.T
    gram.diagonal().sub_(1.0)
    norm = torch.linalg.matrix_norm(gram)
    return torch.where(norm > 0, 2.0 * (gram @ matrix) / norm, 0.0)


def _is_lora_matrix(name: str, shards: ShardView) -> bool:
    return (LORA_A in name or LORA_B in name) and len(shards.shape(name)) == 2
