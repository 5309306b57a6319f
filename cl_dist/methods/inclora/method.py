"""IncLoRA: every task gets LoRA adapters of its own; those of earlier tasks are frozen and stay active."""

from __future__ import annotations

import torch
from peft import PeftModel

from cl_dist.config.schema import TrainConfig
from cl_dist.methods.protocol import Method
from cl_dist.models.lora import frozen_adapters, grow_adapters
from cl_dist.sharding import Shard, ShardView


class IncLora(Method):
    """One adapter per task, their outputs added up; only the newest is trained (with a classifier's head)."""

    def attach(self, model: torch.nn.Module, shards: ShardView, train: TrainConfig) -> None:
        """Note the model, whose adapters grow."""
        assert isinstance(model, PeftModel)  # the recipe is refused otherwise
        self._model, self._shards, self._seed = model, shards, train.seed

    def prepare_task(self, index: int) -> bool:
        """Add the task's adapter, and freeze those before it."""
        return grow_adapters(self._model, index + 1, self._seed)

    def tensors(self) -> dict[str, dict[str, Shard]]:
        """The frozen adapters; the newest one is a part of the training state."""
        return {"frozen": self._shards.frozen(frozen_adapters(self._model))}

    def tensors_loaded(self) -> None:
        """Let every rank have the frozen adapters whole, as before."""
        self._shards.publish_frozen(frozen_adapters(self._model))
