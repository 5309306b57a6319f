"""LwF, learning without forgetting: the model also learns the old model's responses to the new task's samples (Li &
Hoiem 2016, arXiv 1606.09282).

This needs no past samples. The responses are recorded once, before the task's first step, so the old model does not
have to stay in memory.
"""

from __future__ import annotations

import torch

from cl_dist.config.schema import TrainConfig
from cl_dist.heartbeat import beat
from cl_dist.methods.cost import Cost, RankShare
from cl_dist.methods.lwf.config import LwfConfig
from cl_dist.methods.lwf.responses import Responses, divergence_sum, join, respond
from cl_dist.methods.protocol import Method, Probe, TaskPlace
from cl_dist.methods.shared.kept_weights import KeptWeights
from cl_dist.sharding import Shard, ShardView
from cl_dist.tasks.collate import Batch
from cl_dist.tasks.plan import FILLER
from cl_dist.tasks.types import IGNORE


class Lwf(Method):
    """The loss plus `weight * T^2 * KL(old || new)` at temperature T, both averaged over the same targets.

    The paper uses the cross-entropy instead, which differs from the divergence by a constant and so has the same
    gradient. The factor T^2 (Hinton et al. 2015, arXiv 1503.02531) keeps the gradient's scale independent of T.

    Args:
        config: The method's entry in the recipe.
    """

    def __init__(self, config: LwfConfig) -> None:
        super().__init__(config)
        self._old: dict[int, Responses] = {}
        self._probe: Probe | None = None

    def cost(self, share: RankShare) -> Cost:
        """A copy of the weights. The old model's responses come on top, which depend on the data (`start_message`)."""
        kept = 4 * share.elements
        return Cost(host={"lwf's kept weights": kept}, saved=kept)

    def attach(self, model: torch.nn.Module, shards: ShardView, train: TrainConfig) -> None:
        """Allocate memory for the weights at the start of a task, with which a resume records the responses again."""
        self._shards = shards
        self.start = KeptWeights(shards)

    def start_message(self) -> str:
        """What the method costs in memory on this rank."""
        kept = "4 bytes a class" if self.config.top_k is None else f"{8 * self.config.top_k + 4} bytes"
        return (
            f"lwf: the weights at the start of a task take {4 * self.start.elements} bytes of CPU memory on this "
            f"rank, and the old model's responses up to {kept} for each target that it trains on in a task"
        )

    def before_task(self, place: TaskPlace) -> None:
        """Discard the previous task's responses; the first task has no old model."""
        self._old = {}
        self._probe, self._name = (place.probe if place.index > 0 else None), place.name

    def before_step(self, step: int) -> None:
        """Record the old model's responses before this process's first step of the task."""
        if self._probe is None:
            return
        beat(f"recording the old model's responses to task {self._name}")
        if step == 0:
            self.start.keep()
            self._probe.responses(self._record)
        else:  # after a resume: the old model is the one at the start of the task
            self._swap()
            self._probe.responses(self._record)
            self._swap()
        self._probe = None

    def added_loss(self, batch: Batch, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor | None:
        """The divergence from the old model at this micro-batch's targets."""
        if not self._old:
            return None
        old = [self._old[key] for key in batch.keys if key != FILLER]
        if not old:
            return None
        temperature = self.config.temperature
        divergence = divergence_sum(logits[labels != IGNORE], join(old).to(logits.device), temperature)
        return self.config.weight * temperature**2 * divergence

    def tensors(self) -> dict[str, dict[str, Shard]]:
        """The weights at the start of the task."""
        return {"start": self.start.shards}

    def _record(self, batch: Batch, logits: torch.Tensor, labels: torch.Tensor) -> None:
        targets = labels != IGNORE
        responses = respond(logits[targets], self.config.temperature, self.config.top_k).to(torch.device("cpu"))
        counts = targets.reshape(len(batch.keys), -1).sum(dim=1).tolist()
        self._old.update(
            (key, piece) for key, piece in zip(batch.keys, responses.cut(counts), strict=True) if key != FILLER
        )

    def _swap(self) -> None:
        self.start.swap()
        self._shards.publish()
