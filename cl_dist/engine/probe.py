"""Gradients and predictions of given samples, measured with the model in training, and nothing of it changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from cl_dist.engine.collator import Collator
from cl_dist.engine.distributed import device
from cl_dist.engine.engine import TrainingEngine
from cl_dist.heartbeat import beat
from cl_dist.methods.protocol import Probe
from cl_dist.seeds import derive_seed
from cl_dist.tasks.collate import Batch
from cl_dist.tasks.plan import FILLER, share
from cl_dist.tasks.types import Encoded

Chunk = tuple[int, list[int]]
"""Step and sample numbers of a micro-batch."""


class EngineProbe(Probe):
    """See `Probe`.

    Args:
        engine: The run's engine.
        collator: Makes micro-batches of samples.
        tasks: The tasks' training samples, that of the task in hand last.
        learnt: A rank's inputs in the task, each once, in micro-batches.
        collate: The micro-batch of a chunk, as training collates it.
    """

    def __init__(
        self,
        engine: TrainingEngine,
        collator: Collator,
        tasks: Sequence[Sequence[Encoded]],
        learnt: Callable[[int], list[Chunk]],
        collate: Callable[[int, list[int]], Batch],
    ) -> None:
        self.tasks = tasks
        self._engine, self._collator, self._learnt, self._collate = engine, collator, learnt, collate
        self._rank, self._world = torch.distributed.get_rank(), torch.distributed.get_world_size()

    def gradient(self, samples: Sequence[Encoded], take: Callable[[], None], *, mean: bool, what: str) -> bool:
        """See `Probe`. The samples are spread over ranks and over the micro-batches of a step; the rest is fillers."""
        pieces = self._engine.recipe.train.gradient_accumulation
        own = share(list(range(len(samples))), self._world, self._rank)
        seed = derive_seed(self._engine.recipe.train.seed, "mask", len(self.tasks), what)
        chosen = [[samples[number] for number in share(own, pieces, piece)] for piece in range(pieces)]
        batches = [self._collator(some, seed) if some else self._collator.filler(samples[0]) for some in chosen]
        targets = self._targets(samples, batches) if mean else 1
        return self._engine.measure(batches, targets, what, take)

    def _targets(self, samples: Sequence[Encoded], batches: Sequence[Batch]) -> int:
        """Targets of all ranks' micro-batches."""
        if not self._collator.objective.facts.masked:
            return sum(sample.targets for sample in samples)
        count = torch.tensor(sum(batch.targets for batch in batches), device=device())
        torch.distributed.all_reduce(count)
        return int(count.item())

    def responses(self, take: Callable[[Batch, torch.Tensor, torch.Tensor], None]) -> None:
        """See `Probe`. All ranks run the model equally often, as sharded weights demand."""
        chunks = self._learnt(self._rank)
        rounds = max(len(self._learnt(rank)) for rank in range(self._world))
        for step, indices in chunks + [(0, [FILLER])] * (rounds - len(chunks)):
            batch = self._collate(step, indices).to(device())
            take(batch, *self._engine.predict(batch))
            beat()
