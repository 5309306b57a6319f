"""IncLoRA: every task trains new LoRA adapters; those of earlier tasks are frozen and stay active."""

from __future__ import annotations

import math

import torch
from peft import PeftModel

from cl_dist.config.schema import TrainConfig
from cl_dist.methods.cost import Cost, RankShare
from cl_dist.methods.protocol import Method
from cl_dist.models.lora import LORA_A, LORA_B, frozen_adapters, grow_adapters
from cl_dist.sharding import Shard, ShardView


class IncLora(Method):
    """One adapter per task, with their outputs summed. Only the newest is trained (and a classifier's head)."""

    def cost(self, share: RankShare) -> Cost:
        """The frozen adapters of earlier tasks, at the last one; sharded at stage 3. Each rank saves an even share."""
        shapes = [shape for name, shape in share.shapes.items() if LORA_A in name or LORA_B in name]
        adapters = sum(math.prod(shape) for shape in shapes)
        frozen = max(0, share.tasks - 1) * adapters * share.itemsize
        even = frozen if share.replicated else frozen // share.world
        return Cost(device={"earlier adapters": even if share.sharded else frozen}, saved=even)

    def attach(self, model: torch.nn.Module, shards: ShardView, train: TrainConfig) -> None:
        """Remember the model, which gets more adapters over time."""
        assert isinstance(model, PeftModel)  # any other recipe is refused
        self._model, self._shards, self._seed = model, shards, train.seed

    def prepare_task(self, index: int) -> bool:
        """Add the task's adapter and freeze the earlier ones."""
        return grow_adapters(self._model, index + 1, self._seed)

    def tensors(self) -> dict[str, dict[str, Shard]]:
        """The frozen adapters; the newest one belongs to the training state."""
        return {"frozen": self._shards.frozen(frozen_adapters(self._model))}

    def tensors_loaded(self) -> None:
        """Give every rank the whole frozen adapters again."""
        self._shards.publish_frozen(frozen_adapters(self._model))
