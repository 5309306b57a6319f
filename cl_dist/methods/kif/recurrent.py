"""Recurrent-KIF: steps on the task and on a memory of the past alternate, and are fused after every such cycle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from cl_dist.config.methods import RecurrentKifConfig
from cl_dist.config.schema import TrainConfig
from cl_dist.methods.base import Memory, TaskPlace
from cl_dist.methods.kif.fusion import mask_shares, minmax
from cl_dist.methods.kif.importance import Importance
from cl_dist.methods.kif.shared import UnitMethod
from cl_dist.methods.kif.weights import KeptWeights
from cl_dist.methods.replay import past_samples
from cl_dist.sharding import Shard, ShardView
from cl_dist.tasks.collate import Batch
from cl_dist.tasks.types import Encoded


class RecurrentKif(UnitMethod):
    """Recurrent knowledge identification and fusion (arXiv 2502.17510).

    A cycle starts at weights s; its inner steps, on the task's samples, lead to i, its outer steps, on the memory, to
    o. With a unit's shares m and n (`mask_shares` of the two importances) the next cycle starts at
    s + m (i - s) + n (o - i). The importance of either kind of step goes on from cycle to cycle, within a task.

    Args:
        config: The recipe's `method` entry.
    """

    def __init__(self, config: RecurrentKifConfig) -> None:
        super().__init__(config)
        self.config = config
        self._place = TaskPlace(0, "", 0)
        self._step, self._outer = -1, False

    def attach(self, model: torch.nn.Module, shards: ShardView, train: TrainConfig) -> None:
        """Lay out units, the importance of both kinds of steps, scores and two copies of the weights."""
        super().attach(model, shards, train)
        self.past_importance = Importance(shards, self.config)
        self.start, self.turn = KeptWeights(shards), KeptWeights(shards)
        """The weights at the start of a cycle, and where its steps on the memory began."""
        names = ("current", "current_normalised", "accumulated", "accumulated_normalised", "share_new", "share_old")
        self.scores = {name: torch.zeros(len(self.units), dtype=torch.float64) for name in names}

    def start_message(self) -> str:
        """Units, and the memory that they cost on this rank."""
        return self._memory_message(states=2, copies=2)

    def memory(self, index: int, tasks: Sequence[Sequence[Encoded]]) -> Memory | None:
        """A share of every past task's samples; the first task has none."""
        samples = list(past_samples(tasks[:index], self.config.replay_ratio, self._seed))
        return Memory(samples, self.config.inner_steps, self.config.outer_steps) if samples else None

    def before_task(self, place: TaskPlace) -> None:
        """Note how the task's steps alternate."""
        self._place, self._step = place, -1

    def before_forward(self, step: int, batch: Batch) -> None:
        """Keep the weights where a cycle starts and where it turns to the memory."""
        cycles = self._place.cycles
        if cycles is None or step == self._step:  # the step's later micro-batches
            return
        self._step, self._outer = step, cycles.locate(step)[0]
        if cycles.starts(step):
            self.start.keep()
        if cycles.turns(step):
            self.turn.keep()

    def before_update(self) -> None:
        """Add the penalty's gradient, then take the importance to the task or to the past."""
        if not self._outer:
            super().before_update()
            return
        self._orthogonality.add_gradient()
        self.past_importance.update()
        if self.config.outer_learning_rate is not None:
            self._shards.set_learning_rate(self.config.outer_learning_rate)

    def after_update(self) -> None:
        """Fuse at the end of a cycle; that of the task's last one is left to `after_task`."""
        cycles = self._place.cycles
        if cycles is not None and cycles.ends(self._step) and self._step + 1 < self._place.steps:
            self._fuse()

    def update_skipped(self) -> None:
        """A cycle ends with its last step, whether that has updated anything or not."""
        self.after_update()

    def after_task(self, place: TaskPlace) -> None:
        """Fuse the last cycle, and start the next task's importances from zero."""
        if place.cycles is None:
            self._score()
            self.scores["share_new"].fill_(1.0)
            self.scores["share_old"].fill_(0.0)
        else:
            self._fuse()
        self.importance.reset()
        self.past_importance.reset()
        self._outer = False

    def score_tensors(self) -> Mapping[str, torch.Tensor]:
        """`current` is the task's scores, `accumulated` the past's as the memory showed them; the shares are of the two
        changes, not of the weights.
        """
        return self.scores

    def tensors(self) -> dict[str, dict[str, Shard]]:
        """Both importances and both copies of the weights along the shards, and the scores."""
        return {
            "smoothed": self.importance.smoothed,
            "uncertainty": self.importance.uncertainty,
            "past_smoothed": self.past_importance.smoothed,
            "past_uncertainty": self.past_importance.uncertainty,
            "start": self.start.shards,
            "turn": self.turn.shards,
            "scores": self._scores_to_save(),
        }

    def _score(self) -> None:
        """Fill in the unit scores of both kinds of steps (collective)."""
        for name, importance in (("current", self.importance), ("accumulated", self.past_importance)):
            self.scores[name].copy_(importance.unit_scores(self.units, self._device))
            self.scores[f"{name}_normalised"].copy_(minmax(self.scores[name]))

    def _fuse(self) -> None:
        """Replace the masters by s + m (i - s) + n (o - i) and publish them (collective)."""
        self._score()
        config = self.config
        new, old = mask_shares(
            self.scores["current"],
            self.scores["accumulated"],
            config.threshold,
            both=(config.weight_new, config.weight_old),
            neither=(config.weight_neither, 1.0 - config.weight_neither),
        )
        self.scores["share_new"].copy_(new)
        self.scores["share_old"].copy_(old)
        # In two passes, each with one number per unit and one copy: first m i + n (o - i), then + (1 - m) s.
        self.turn.mix(self.units, old, lambda share, turn, end: share * (end - turn))
        self._add(self.turn, new)
        self._add(self.start, 1.0 - new)
        self._shards.publish()

    def _add(self, kept: KeptWeights, shares: torch.Tensor) -> None:
        kept.mix(self.units, shares, lambda share, weights, sum_: torch.addcmul(sum_, share, weights))
