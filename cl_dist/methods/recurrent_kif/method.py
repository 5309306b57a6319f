"""Recurrent-KIF: steps on the task and on a memory of the past alternate; each such cycle ends with a fusion."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from cl_dist.config.schema import TrainConfig
from cl_dist.methods.cost import Cost, RankShare
from cl_dist.methods.kif.fusion import MixedWeights, mask_shares, minmax, shares_of
from cl_dist.methods.kif.importance import Importance, slice_sums
from cl_dist.methods.kif.unit_method import UnitMethod
from cl_dist.methods.protocol import Memory, TaskPlace
from cl_dist.methods.recurrent_kif.config import RecurrentKifConfig
from cl_dist.methods.recurrent_kif.elements import threshold
from cl_dist.methods.shared.samples import past_samples
from cl_dist.sharding import Shard, ShardView
from cl_dist.tasks.collate import Batch
from cl_dist.tasks.types import Encoded


class RecurrentKif(UnitMethod):
    """Recurrent knowledge identification and fusion (arXiv 2502.17510).

    A cycle starts at weights s. Its inner steps, on the task's samples, lead to i; its outer steps, on the memory, lead
    to o. With a unit's shares m and n (`mask_shares` of the two importances), the next cycle starts at
    s + m (i - s) + n (o - i). Within a task, the importances of inner and outer steps carry over from cycle to cycle
    unless the recipe resets them.

    Args:
        config: The method's entry in the recipe.
    """

    def __init__(self, config: RecurrentKifConfig) -> None:
        super().__init__(config)
        self.config: RecurrentKifConfig
        self._place = TaskPlace(0, "", 0)
        self._step, self._outer = -1, False

    def cost(self, share: RankShare) -> Cost:
        """Two pairs of states, two copies of the weights, six numbers per unit; the collectives of one fusion."""
        return self._cost(share, states=2, copies=2, scores=6)

    def attach(self, model: torch.nn.Module, shards: ShardView, train: TrainConfig) -> None:
        """Allocate the importance of inner and outer steps, scores and two copies of the weights."""
        super().attach(model, shards, train)
        self.past_importance = Importance(shards, self.config.importance_dtype)
        self.start, self.turn = MixedWeights(shards), MixedWeights(shards)
        """The weights at the start of a cycle (s), and at the start of its steps on the memory (i)."""
        names = ("current", "current_normalised", "accumulated", "accumulated_normalised", "share_new", "share_old")
        self.scores = {name: torch.zeros(len(self.units), dtype=torch.float64) for name in names}

    def start_message(self) -> str:
        """The number of units, and what they cost in memory on this rank."""
        return self._memory_message(states=2, copies=2)

    def memory(self, index: int, tasks: Sequence[Sequence[Encoded]]) -> Memory | None:
        """A share of each past task's samples; the first task has no memory."""
        samples = past_samples(tasks[:index], self.config.replay_ratio, self._seed)
        config = self.config
        scheduled = config.schedule_over == "all_steps"
        memory = Memory(samples, config.inner_steps, config.outer_steps, config.fuse_last_cycle, scheduled)
        return memory if samples else None

    def before_task(self, place: TaskPlace) -> None:
        """Remember how the task's steps alternate."""
        super().before_task(place)
        self._place, self._step = place, -1

    def before_forward(self, step: int, batch: Batch) -> None:
        """Copy the weights when a cycle starts, and when it turns to the memory."""
        cycles = self._place.cycles
        if cycles is None or step == self._step:  # the step's later micro-batches
            return
        self._step, self._outer = step, cycles.locate(step)[0]
        if cycles.starts(step):
            self.start.keep()
        if cycles.turns(step):
            self.turn.keep()

    def before_backward(self, loss: torch.Tensor) -> torch.Tensor:
        """Scale the loss on the memory."""
        return loss * self.config.outer_loss_weight if self._outer else loss

    def before_update(self) -> None:
        """Add the penalty's gradient, then measure the importance to the task or to the past."""
        if not self._outer:
            super().before_update()
            return
        self._orthogonality.add_gradient()
        self._take_importance(self.past_importance)
        if self.config.outer_learning_rate is not None:
            self._shards.set_learning_rate(self.config.outer_learning_rate)

    def after_update(self) -> None:
        """Fuse at the end of a cycle; `after_task` does so at the end of the task."""
        super().after_update()
        cycles = self._place.cycles
        if cycles is not None and cycles.ends(self._step) and self._step + 1 < self._place.steps:
            self._fuse()

    def update_skipped(self) -> None:
        """A cycle ends with its last step, even if that step was skipped."""
        self.after_update()

    def after_task(self, place: TaskPlace) -> None:
        """Fuse the last cycle, unless it has no steps on the memory, and reset the importances for the next task."""
        if place.cycles is not None and place.cycles.ends(place.steps - 1):
            self._fuse()
        elif place.cycles is None or place.cycles.outer_steps == 0:
            self._score()
            self.scores["share_new"].fill_(1.0)
            self.scores["share_old"].fill_(0.0)
        self.importance.reset()
        self.past_importance.reset()
        self._outer = False

    def score_tensors(self) -> Mapping[str, torch.Tensor]:
        """Scores for the task (`current`) and, measured on the memory, for the past (`accumulated`), and the shares.

        The shares are those of the two changes, not of the weights.
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
        """Compute the unit scores of inner and outer steps (collective)."""
        for name, importance in (("current", self.importance), ("accumulated", self.past_importance)):
            self.scores[name].copy_(importance.unit_scores(self.units, self._device))
            self.scores[f"{name}_normalised"].copy_(minmax(self.scores[name]))

    def _fuse(self) -> None:
        """Replace the masters with s + m (i - s) + n (o - i) and publish them (collective)."""
        self._score()
        if self.config.masks == "units":
            self._fuse_units()
        else:
            self._fuse_elements()
        self._shards.publish()
        if self.config.empty_inner_scores:
            self.importance.reset()
        if self.config.empty_outer_scores:
            self.past_importance.reset()

    def _fuse_units(self) -> None:
        """Fuse with one pair of shares m, n per unit."""
        new, old = mask_shares(
            self.scores["current"], self.scores["accumulated"], self.config.threshold, **self._constants()
        )
        self.scores["share_new"].copy_(new)
        self.scores["share_old"].copy_(old)

        # The masters hold o. `mix` takes one number per unit and one copy, so the sum needs three passes.
        def add(share: torch.Tensor, weights: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
            return torch.addcmul(total, share, weights)

        self.turn.mix(self.units, old, lambda share, turn, end: share * (end - turn))  # n (o - i)
        self.turn.mix(self.units, new, add)  # + m i
        self.start.mix(self.units, 1.0 - new, add)  # + (1 - m) s

    def _constants(self) -> dict[str, tuple[float, float]]:
        config = self.config
        both = (config.weight_new, config.weight_old)
        return {"both": both, "neither": (config.weight_neither, 1.0 - config.weight_neither)}

    def _fuse_elements(self) -> None:
        """Fuse with one pair of shares m, n per element; a unit's reported shares are means over its elements."""
        cuts = [
            threshold(importance, self._shards, self.config.threshold, self._device)
            for importance in (self.importance, self.past_importance)
        ]
        means = self._unit_means(lambda name: ((at, new) for at, new, _ in self._element_shares(name, *cuts)))
        self.scores["share_new"].copy_(means)
        means = self._unit_means(lambda name: ((at, old) for at, _, old in self._element_shares(name, *cuts)))
        self.scores["share_old"].copy_(means)
        for name, start in self.start.shards.items():
            for at, new, old in self._element_shares(name, *cuts):
                weights = self.start.master(name).narrow(0, at, new.numel())
                first, turn = (
                    kept.data.narrow(0, at, new.numel()).to(weights.device) for kept in (start, self.turn.shards[name])
                )
                weights.copy_(first + new.to(weights) * (turn - first) + old.to(weights) * (weights - turn))

    def _element_shares(
        self, name: str, cut: float, past_cut: float
    ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Yield the shares of this rank's elements of a parameter: (offset, new, old)."""
        pieces = zip(self.importance.element_scores(name), self.past_importance.element_scores(name), strict=True)
        for (at, scores), (_, past) in pieces:
            yield at, *shares_of(scores > cut, past > past_cut, **self._constants())

    def _unit_means(self, values: Callable[[str], Iterator[tuple[int, torch.Tensor]]]) -> torch.Tensor:
        """Mean of the elements' values in each unit, `(units,)` float64 (collective)."""
        sums = slice_sums(self._shards, self.units, values, self._device)
        total, count = (torch.zeros(len(self.units), dtype=torch.float64) for _ in range(2))
        for part, slices in zip(self.units.parts.values(), sums, strict=True):
            total[part.first : part.first + part.count] += slices
            count[part.first : part.first + part.count] += part.elements
        return total / count
