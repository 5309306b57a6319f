"""EWC: a quadratic penalty holds back weights that mattered to past tasks (Kirkpatrick et al. 2017, arXiv 1612.00796).

How much a weight mattered is measured by the diagonal of the empirical Fisher information: the squared gradient of one
sample's log-likelihood, averaged over samples. ZeRO's reduced gradients are sums over samples, and the square of a sum
is not the sum of the squares. So each sample gets a reduced gradient to itself: one rank computes it while the others
run a filler. This takes the same time and gives the same numbers on any number of ranks.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import torch

from cl_dist.config.schema import TrainConfig
from cl_dist.heartbeat import beat
from cl_dist.methods.cost import Cost, RankShare
from cl_dist.methods.ewc.config import EwcConfig
from cl_dist.methods.protocol import Method, TaskPlace
from cl_dist.methods.rehearsal import Rehearsal, Rehearsed
from cl_dist.methods.shared.samples import check_fits_a_step
from cl_dist.seeds import derive_seed
from cl_dist.sharding import Shard, ShardView


class Ewc(Method):
    """Elastic weight consolidation: the loss plus `weight / 2 * sum F (theta - anchor)^2`.

    `separate` has one penalty per past task t, with its Fisher information F_t and its weights theta_t. Up to a
    constant, their sum is a single penalty with F = sum F_t and the anchor sum F_t theta_t / F, so only these two are
    stored. `online` (Schwarz et al. 2018, arXiv 1805.06370) stores F <- gamma F + F_t, anchored at the latest weights.

    Args:
        config: The method's entry in the recipe.
    """

    def __init__(self, config: EwcConfig) -> None:
        super().__init__(config)
        self._holds_back = False

    def cost(self, share: RankShare) -> Cost:
        """Fisher information and anchors in float32, and a task's own information while it is measured at its end.

        A step reads both, weight and gradient, and writes the gradient.
        """
        kept = 8 * share.elements
        return Cost.beside_masters(share, {"ewc's information and anchors": kept}) + Cost(
            saved=kept, traffic=20 * share.elements
        )

    def rehearse(self, rehearsal: Rehearsal) -> Rehearsed:
        """Check that the measured samples fit into a step."""
        check_fits_a_step("fisher_batch", self.config.fisher_batch, rehearsal.train, rehearsal.shards.ranks)
        return Rehearsed()

    def attach(self, model: torch.nn.Module, shards: ShardView, train: TrainConfig) -> None:
        """Allocate zero Fisher information and anchors along the masters, also for a rebuilt engine."""
        check_fits_a_step("fisher_batch", self.config.fisher_batch, train)
        self._shards, self._seed = shards, train.seed
        self.fisher, self.anchor = self._zeros(), self._zeros()

    def start_message(self) -> str:
        """What the method costs in memory on this rank."""
        owned = sum(shard.data.numel() for shard in self.fisher.values())
        return (
            f"ewc: Fisher information and anchors take {8 * owned} bytes on this rank (8 for each of its {owned} "
            f"parameters), and {4 * owned} more while the Fisher information of a task is measured"
        )

    def before_task(self, place: TaskPlace) -> None:
        """There is no penalty in the first task."""
        self._holds_back = place.index > 0

    @torch.no_grad()
    def before_update(self) -> None:
        """Add the penalty's gradient, `weight * F (theta - anchor)`, to the reduced gradient."""
        if not self._holds_back:
            return
        for name, master, fisher in self._owned(self.fisher):
            gradient = self._shards.own_gradient(name)
            if gradient is not None:
                pull = (master - self.anchor[name].data).mul_(fisher)
                gradient.data.add_(pull.to(gradient.data.device), alpha=self.config.weight)
        self._shards.own_gradients_changed()

    def after_task(self, place: TaskPlace) -> None:
        """Measure the task's Fisher information at its final weights, and merge it into that of the past."""
        beat(f"measuring the Fisher information of task {place.name}")
        self._consolidate(self._measure(place))

    def tensors(self) -> dict[str, dict[str, Shard]]:
        """Fisher information and anchors, float32 along the shards."""
        return {"fisher": self.fisher, "anchor": self.anchor}

    def _zeros(self) -> dict[str, Shard]:
        masters = ((name, self._shards.master(name)) for name in self._shards.names)
        return {
            name: Shard(master.start, torch.zeros_like(master.data)) for name, master in masters if master is not None
        }

    def _owned(self, shards: dict[str, Shard]) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        """Yield name, master weights and elements of `shards` for each parameter that this rank partly owns."""
        for name, shard in shards.items():
            master = self._shards.master(name)
            assert master is not None  # the shards were laid out along the masters
            yield name, master.data, shard.data

    def _measure(self, place: TaskPlace) -> dict[str, Shard]:
        """The Fisher information: squared gradients of the log-likelihood, of `fisher_batch` samples at a time."""
        assert place.probe is not None
        samples = place.probe.tasks[place.index]
        count = min(self.config.fisher_samples or len(samples), len(samples))
        drawn = random.Random(derive_seed(self._seed, "fisher", place.index)).sample(range(len(samples)), count)
        fisher, size, measured = self._zeros(), self.config.fisher_batch, 0
        for start in range(0, count, size):
            some = [samples[number] for number in drawn[start : start + size]]
            what = f"the Fisher information of training sample {', '.join(str(sample.index) for sample in some)}"
            if place.probe.gradient(some, lambda: self._add_squares(fisher), mean=False, what=what):
                measured += len(some)
        for shard in fisher.values():
            shard.data.div_(max(1, measured))
        return fisher

    def _add_squares(self, fisher: dict[str, Shard]) -> None:
        for name, shard in fisher.items():
            gradient = self._shards.own_gradient(name)
            if gradient is not None:
                own = gradient.data.to(shard.data)
                shard.data.addcmul_(own, own)

    @torch.no_grad()
    def _consolidate(self, new: dict[str, Shard]) -> None:
        """Merge a task's Fisher information into the stored one, in place."""
        for name, master, fisher in self._owned(self.fisher):
            anchor, added = self.anchor[name].data, new[name].data
            if self.config.variant == "online":
                fisher.mul_(self.config.gamma).add_(added)
                anchor.copy_(master)
            else:
                fisher.add_(added)
                # The anchor a = sum F_t theta_t / F is updated as a + F_t / F (theta_t - a). Where F is 0, so is the
                # penalty, whatever the anchor.
                share = torch.where(fisher > 0, added / fisher, 1.0)
                anchor.copy_(torch.lerp(anchor, master, share))
