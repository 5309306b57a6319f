"""O-LoRA's penalty, as a gradient that is added to the shards (arXiv 2310.14152)."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from cl_dist.methods.shared.matrices import WholeMatrices
from cl_dist.models.lora import LORA_A, LORA_B
from cl_dist.sharding import ShardView, whole_parameters


class PastOverlap:
    """`lambda1 * sum |A_old A_new^T| + lambda2 * sum ||W||_F`, on the float32 masters of the new adapter.

    The first sum is over the elements of the products in every module and for every old adapter, the second over the
    new lora_A and lora_B. Both are those of the authors' code (cmnfriend/O-LoRA, src/uie_trainer_lora.py: absolute
    values, and norms that are not squared).

    Args:
        model: The model with its adapters.
        shards: The engine's shards.
        lambda1: Weight of the overlap with the old adapters.
        lambda2: Weight of the new matrices' norms.
        device: Where collectives run.
    """

    def __init__(
        self, model: torch.nn.Module, shards: ShardView, lambda1: float, lambda2: float, device: torch.device
    ) -> None:
        self._model, self._lambda1, self._lambda2 = model, lambda1, lambda2
        wanted = (LORA_A, LORA_B) if lambda2 > 0 else (LORA_A,)
        names = [name for name in shards.names if any(kind in name for kind in wanted)]
        self._matrices = WholeMatrices(shards, {name: LORA_A in name for name in names}, device)
        self._past: dict[torch.Size, torch.Tensor] = {}

    @torch.no_grad()
    def gather_past(self, frozen: Iterable[str]) -> None:
        """Copy the old adapters' lora_A, whole, in the model's dtype (collective).

        Args:
            frozen: Names of the old adapters' parameters.
        """
        self._past = {}
        old: dict[str, list[str]] = {}
        for name in frozen:
            if LORA_A in name:
                old.setdefault(name.partition(LORA_A)[0], []).append(name)
        if not old or self._lambda1 == 0:
            return
        for (is_a, shape), members in self._matrices.kinds.items():
            if is_a:
                self._past[shape] = torch.stack([self._joined(old[name.partition(LORA_A)[0]]) for name in members])

    def _joined(self, names: Iterable[str]) -> torch.Tensor:
        """The rows of several matrices, one below the other."""
        return torch.cat([matrix.clone() for matrix in whole_parameters(self._model, names)])

    @torch.no_grad()
    def add_gradient(self) -> None:
        """Add the penalty's gradient to the reduced gradients (collective)."""
        if not self._past and self._lambda2 == 0:
            return
        gradients = {}
        for (is_a, shape), matrices in self._matrices.gather().items():
            gradients[is_a, shape] = self._lambda2 * _norm_gradients(matrices)
            if is_a and shape in self._past:
                gradients[is_a, shape] += self._lambda1 * _overlap_gradients(matrices, self._past[shape].float())
        self._matrices.add_gradients(gradients)


def _overlap_gradients(new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """Gradient of sum |new old^T| by `new` `(count, r, n)` with `old` `(count, past ranks, n)`: sign(new old^T) old."""
    return torch.sign(new @ old.mT) @ old


def _norm_gradients(matrices: torch.Tensor) -> torch.Tensor:
    """Gradient of ||W||_F for each W of `(count, rows, columns)`: W / ||W||_F; zero where W is."""
    norm = torch.linalg.matrix_norm(matrices, keepdim=True)
    return torch.where(norm > 0, matrices / norm, 0.0)
