"""Replay: samples of past tasks, kept or drawn anew, are mixed into a task's own training.

Which ones follows from the recipe's seed and the samples alone, so nothing of the memory has to be saved.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from cl_dist.config.schema import TrainConfig
from cl_dist.methods.protocol import Method
from cl_dist.methods.replay.config import ReplayConfig
from cl_dist.methods.shared.past_samples import past_samples
from cl_dist.seeds import derive_seed
from cl_dist.sharding import ShardView
from cl_dist.tasks.types import Encoded


class Replay(Method):
    """Mixes a memory of past tasks into every task but the first; each epoch goes through both.

    Args:
        config: The recipe's `method` entry.
    """

    def __init__(self, config: ReplayConfig) -> None:
        super().__init__(config)

    def attach(self, model: torch.nn.Module, shards: ShardView, train: TrainConfig) -> None:
        """Note the run's seed."""
        self._seed = train.seed

    def training_data(self, index: int, tasks: Sequence[Sequence[Encoded]]) -> list[Encoded]:
        """The memory as it is when the task begins."""
        if self.config.memory_size is not None:
            return reservoir(tasks[:index], self.config.memory_size, self._seed)
        return list(past_samples(tasks[:index], self.config.ratio, self._seed))


def reservoir(tasks: Sequence[Sequence[Encoded]], size: int, seed: int) -> list[Encoded]:
    """A uniform sample of all that was seen, kept up to date while it streams by (Vitter 1985, Algorithm R).

    After one more task the memory is what going on from here would make of it: some samples have given way.

    Args:
        tasks: The past tasks' training samples, in the order of the stream.
        size: Most samples that are kept, of all tasks together.
        seed: The run's seed.
    """
    draw = random.Random(derive_seed(seed, "reservoir"))
    memory: list[Encoded] = []
    for seen, sample in enumerate(sample for samples in tasks for sample in samples):
        if len(memory) < size:
            memory.append(sample)
        elif (place := draw.randrange(seen + 1)) < size:
            memory[place] = sample
    return memory
