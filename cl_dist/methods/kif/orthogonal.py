"""The penalty that keeps LoRA's ranks orthogonal, as a gradient that is added to the shards (KIF, arXiv 2408.05200)."""

from __future__ import annotations

import torch

from cl_dist.methods.shared.matrices import WholeMatrices
from cl_dist.models.lora import LORA_A, LORA_B
from cl_dist.sharding import ShardView


class Orthogonality:
    """`strength * mean over LoRA matrices of ||A A^T - I||_F` (for lora_B `||B^T B - I||_F`), on the float32 masters.

    Args:
        shards: The engine's shards.
        strength: The penalty's weight (lambda).
        device: Where collectives run.
    """

    def __init__(self, shards: ShardView, strength: float, device: torch.device) -> None:
        self._strength = strength
        names = [name for name in shards.names if _is_lora_matrix(name, shards)] if strength > 0 else []
        self._matrices = WholeMatrices(shards, {name: LORA_A in name for name in names}, device)

    @torch.no_grad()
    def add_gradient(self) -> None:
        """Add the penalty's gradient to the reduced gradients (collective)."""
        if not len(self._matrices):
            return
        gradients = {
            (is_a, shape): _norm_gradients(matrices) if is_a else _norm_gradients(matrices.mT).mT
            for (is_a, shape), matrices in self._matrices.gather().items()
        }
        self._matrices.add_gradients(gradients, self._strength / len(self._matrices))


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
