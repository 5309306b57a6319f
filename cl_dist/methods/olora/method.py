"""O-LoRA: IncLoRA with a penalty that keeps new adapters orthogonal to the old ones (arXiv 2310.14152)."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from cl_dist.methods.cost import Cost, RankShare
from cl_dist.methods.inclora.method import IncLora
from cl_dist.methods.olora.config import OLoraConfig
from cl_dist.methods.protocol import TaskPlace
from cl_dist.methods.shared.matrices import WholeMatrices
from cl_dist.models.lora import LORA_A, LORA_B, frozen_adapters
from cl_dist.sharding import ShardView, whole_parameters


class OLora(IncLora):
    """IncLoRA whose new adapters are kept orthogonal to the old ones.

    Args:
        config: The method's entry in the recipe.
    """

    def __init__(self, config: OLoraConfig) -> None:
        super().__init__(config)
        self.config: OLoraConfig

    def cost(self, share: RankShare) -> Cost:
        """In addition to IncLoRA's, every earlier lora_A whole on each rank; per step, the new matrices are summed."""
        sizes = {name: math.prod(shape) for name, shape in share.shapes.items() if LORA_A in name or LORA_B in name}
        of_a = sum(size for name, size in sizes.items() if LORA_A in name)
        summed = 4 * (sum(sizes.values()) if self.config.lambda2 > 0 else of_a)
        past = max(0, share.tasks - 1) * of_a * share.itemsize
        step = () if share.replicated else (share.all_reduce(summed, "new adapters for the penalty"),)
        return super().cost(share) + Cost(device={"earlier lora_A for the penalty": past}, step=step)

    def before_task(self, place: TaskPlace) -> None:
        """Set up the penalty, now that the new adapter and the old ones are in place."""
        device = next(self._model.parameters()).device
        self._overlap = PastOverlap(self._model, self._shards, self.config.lambda1, self.config.lambda2, device)
        self._overlap.gather_past(frozen_adapters(self._model))

    def before_update(self) -> None:
        """Add the penalty's gradient."""
        self._overlap.add_gradient()


class PastOverlap:
    """O-LoRA's penalty on the float32 masters of the new adapter, as a gradient added to the shards.

    The penalty is `lambda1 * sum |A_old A_new^T| + lambda2 * sum ||W||_F`. The first sum runs over the elements of the
    products in every module, with every old adapter; the second runs over the new lora_A and lora_B. Both are as in the
    authors' code (cmnfriend/O-LoRA, src/uie_trainer_lora.py): absolute values, and norms that are not squared.

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
            # d ||W||_F / dW = W / ||W||_F, or 0 where W is 0
            norm = torch.linalg.matrix_norm(matrices, keepdim=True)
            gradients[is_a, shape] = self._lambda2 * torch.where(norm > 0, matrices / norm, 0.0)
            if is_a and shape in self._past:
                # d sum |A_new A_old^T| / dA_new = sign(A_new A_old^T) A_old
                past = self._past[shape].float()
                gradients[is_a, shape] += self._lambda1 * (torch.sign(matrices @ past.mT) @ past)
        self._matrices.add_gradients(gradients)
