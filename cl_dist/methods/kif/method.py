"""KIF and TaSL as a method: importance before every update, fusion after every task but the first."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from cl_dist.config.schema import KifConfig, TrainConfig
from cl_dist.methods.base import Method, TaskPlace
from cl_dist.methods.kif.importance import Importance
from cl_dist.methods.kif.orthogonal import Orthogonality
from cl_dist.methods.kif.replay import past_samples
from cl_dist.methods.kif.results import write_scores
from cl_dist.methods.kif.scores import UnitScores
from cl_dist.methods.kif.units import LORA_A, UnitMap, spread
from cl_dist.sharding import Shard, ShardView
from cl_dist.tasks.types import Encoded


class Kif(Method):
    """Knowledge identification and fusion; TaSL is the same with other settings.

    Args:
        config: The recipe's `method` entry.
    """

    def __init__(self, config: KifConfig) -> None:
        self.config = config
        self.keeps_unfused = config.keep_unfused

    def attach(self, model: torch.nn.Module, shards: ShardView, train: TrainConfig) -> None:
        """Cut the model into units and lay importance out along the shards; a rebuilt engine begins with none."""
        lora = any(LORA_A in name for name in shards.names)
        self._shards, self._device, self._seed = shards, next(model.parameters()).device, train.seed
        self.units = UnitMap.build({n: tuple(shards.shape(n)) for n in shards.names}, self.config.units_for(lora))
        self.importance = Importance(shards, self.config)
        self.scores = UnitScores(len(self.units), self.config)
        self.fused = {name: _in_cpu_memory(shard) for name, shard in self.importance.smoothed.items()}
        """The weights that the last task ended with, along the shards: what the next task's are fused with."""
        self._orthogonality = Orthogonality(shards, self.config.orthogonal_for(lora), self._device)

    def start_message(self) -> str:
        """Units, and the memory that they cost on this rank."""
        owned = self.importance.elements
        return (
            f"{self.config.name}: {len(self.units)} skill units ({next(iter(self.units.names), '')} is the first); "
            f"importance takes {8 * owned} bytes on this rank (8 for each of its {owned} parameters), "
            f"the previous task's weights {4 * owned} bytes of CPU memory"
        )

    def training_data(self, index: int, tasks: Sequence[Sequence[Encoded]]) -> list[Encoded]:
        """The replay memory: a share of every past task's samples."""
        return list(past_samples(tasks[:index], self.config.replay_ratio, self._seed))

    def before_update(self) -> None:
        """Add the penalty's gradient, then take the step's importance."""
        self._orthogonality.add_gradient()
        self.importance.update()

    def after_task(self, place: TaskPlace) -> None:
        """Score the units, fuse, and start the next task's importance from zero."""
        self.scores.take(self.importance.unit_scores(self.units, self._device), first=place.index == 0)
        if place.index > 0:
            self._fuse()
            self._shards.publish()
        for name, before in self.fused.items():
            before.data.copy_(self._master(name).data)
        self.importance.reset()

    def write_results(self, folder: Path) -> None:
        """Leave units and scores in the task's folder."""
        write_scores(folder, self.units, self.scores)

    def tensors(self) -> dict[str, dict[str, Shard]]:
        """Importance and previous weights along the shards, and the scores, which every rank holds whole."""
        return {
            "smoothed": self.importance.smoothed,
            "uncertainty": self.importance.uncertainty,
            "fused": self.fused,
            "scores": {name: Shard(0, tensor) for name, tensor in self.scores.tensors().items()},
        }

    def _fuse(self) -> None:
        """Make it share * own weights + (1 - share) * the previous ones, on the float32 masters of this rank."""
        for name, before in self.fused.items():
            part, weights = self.units.parts[name], self._master(name).data
            share = self.scores.share_new[part.first : part.first + part.count].to(weights)
            for offset, each in spread(share, part, before.start, before.stop):
                new = weights.narrow(0, offset, each.numel())
                old = before.data.narrow(0, offset, each.numel()).to(weights.device)
                new.copy_(torch.lerp(old, new, each))  # exact where the share is 0 or 1

    def _master(self, name: str) -> Shard:
        master = self._shards.master(name)
        assert master is not None  # `fused` names what this rank owns
        return master


def _in_cpu_memory(shard: Shard) -> Shard:
    return Shard(shard.start, torch.zeros(shard.data.numel(), dtype=torch.float32))
