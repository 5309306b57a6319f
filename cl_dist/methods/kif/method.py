"""KIF and TaSL: importance is measured before each update, and weights are fused after each task but the first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from cl_dist.config.schema import TrainConfig
from cl_dist.methods.cost import Cost, RankShare
from cl_dist.methods.kif.config import KifConfig
from cl_dist.methods.kif.fusion import MixedWeights, UnitScores
from cl_dist.methods.kif.importance import Importance
from cl_dist.methods.kif.unit_method import UnitMethod
from cl_dist.methods.protocol import TaskPlace
from cl_dist.methods.shared.samples import past_samples
from cl_dist.sharding import Shard, ShardView
from cl_dist.tasks.samples import Samples
from cl_dist.tasks.types import Encoded


class Kif(UnitMethod):
    """Knowledge identification and fusion; TaSL is the same with other settings.

    Args:
        config: The method's entry in the recipe.
    """

    def __init__(self, config: KifConfig) -> None:
        super().__init__(config)
        self.config: KifConfig
        self._step = 0

    def cost(self, share: RankShare) -> Cost:
        """One pair of states, one copy of the weights, five numbers per unit (`UnitScores`)."""
        return self._cost(share, states=1, copies=1, scores=5)

    def attach(self, model: torch.nn.Module, shards: ShardView, train: TrainConfig) -> None:
        """Allocate importance, scores and a copy of the previous weights."""
        super().attach(model, shards, train)
        self.scores = UnitScores(len(self.units), self.config)
        self.fused = MixedWeights(shards)
        """The last task's final weights, which the next task's weights are fused with."""

    def start_message(self) -> str:
        """The number of units, and what they cost in memory on this rank."""
        return self._memory_message(states=1, copies=1)

    def training_data(self, index: int, tasks: Sequence[Sequence[Encoded]]) -> Samples:
        """The replay memory: a share of each past task's samples."""
        return past_samples(tasks[:index], self.config.replay_ratio, self._seed)

    def before_step(self, step: int) -> None:
        """Remember the step's number for `importance_from_step`."""
        self._step = step

    def _take_importance(self, importance: Importance) -> None:
        """Measure as in `UnitMethod`, but leave out a task's first steps if the recipe says so."""
        if self._step + 1 >= self.config.importance_from_step:
            super()._take_importance(importance)

    def after_task(self, place: TaskPlace) -> None:
        """Score the units, fuse, and reset the importance for the next task."""
        self.scores.config = self.config
        self.scores.take(self.importance.unit_scores(self.units, self._device), first=place.index == 0)
        if place.index > 0:
            # lerp is exact where the share is 0 or 1
            self.fused.mix(self.units, self.scores.share_new, lambda share, old, new: torch.lerp(old, new, share))
            self._shards.publish()
        self.fused.keep()
        self.importance.reset()

    def score_tensors(self) -> Mapping[str, torch.Tensor]:
        """The tensors of `UnitScores`."""
        return self.scores.tensors()

    def tensors(self) -> dict[str, dict[str, Shard]]:
        """Importance and previous weights along the shards, and the scores, which every rank holds whole."""
        return {
            "smoothed": self.importance.smoothed,
            "uncertainty": self.importance.uncertainty,
            "fused": self.fused.shards,
            "scores": self._scores_to_save(),
        }
