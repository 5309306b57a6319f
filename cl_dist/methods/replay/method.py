"""Replay: samples of past tasks are mixed into a task's own training data.

They depend only on the recipe's seed and the data, so the memory does not have to be saved.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from cl_dist.config.schema import TrainConfig
from cl_dist.methods.protocol import Method
from cl_dist.methods.replay.config import ReplayConfig
from cl_dist.methods.shared.samples import past_samples
from cl_dist.seeds import derive_seed
from cl_dist.sharding import ShardView
from cl_dist.tasks.samples import Samples, join
from cl_dist.tasks.types import Encoded


class Replay(Method):
    """Mixes a memory of past tasks into every task but the first; each epoch covers both.

    Args:
        config: The method's entry in the recipe.
    """

    def __init__(self, config: ReplayConfig) -> None:
        super().__init__(config)

    def attach(self, model: torch.nn.Module, shards: ShardView, train: TrainConfig) -> None:
        """Remember the run's seed."""
        self._seed = train.seed

    def training_data(self, index: int, tasks: Sequence[Sequence[Encoded]]) -> Samples:
        """The memory as it is when the task begins."""
        if self.config.memory_size is not None:
            return reservoir(tasks[:index], self.config.memory_size, self._seed)
        return past_samples(tasks[:index], self.config.ratio, self._seed)


def reservoir(tasks: Sequence[Sequence[Encoded]], size: int, seed: int) -> Samples:
    """A uniform sample of a stream of samples (Vitter 1985, Algorithm R).

    The memory after one more task is the one that this task's samples make of the memory before it: each of them may
    replace an older sample.

    Args:
        tasks: The past tasks' training samples, in stream order.
        size: Maximum number of samples to keep, over all tasks.
        seed: The run's seed.
    """
    draw = random.Random(derive_seed(seed, "reservoir"))
    stream = join(tasks)
    memory: list[int] = []
    for seen in range(len(stream)):
        if len(memory) < size:
            memory.append(seen)
        elif (place := draw.randrange(seen + 1)) < size:
            memory[place] = seen
    return stream.pick(memory)
