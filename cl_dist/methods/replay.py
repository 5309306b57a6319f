"""Replay: samples of past tasks, kept or drawn anew, are mixed into a task's own training.

Which ones follows from the recipe's seed and the samples alone, so nothing of the memory has to be saved. KIF, TaSL and
Recurrent-KIF take theirs from here too.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence

import torch

from cl_dist.config.methods import ReplayConfig
from cl_dist.config.schema import TrainConfig
from cl_dist.methods.base import Method
from cl_dist.seeds import derive_seed
from cl_dist.sharding import ShardView
from cl_dist.tasks.types import Encoded


class Replay(Method):
    """Mixes a memory of past tasks into every task but the first; each epoch goes through both.

    Args:
        config: The recipe's `method` entry.
    """

    def __init__(self, config: ReplayConfig) -> None:
        self.config = config

    def attach(self, model: torch.nn.Module, shards: ShardView, train: TrainConfig) -> None:
        """Note the run's seed."""
        self._seed = train.seed

    def training_data(self, index: int, tasks: Sequence[Sequence[Encoded]]) -> list[Encoded]:
        """The memory as it is when the task begins."""
        if self.config.memory_size is not None:
            return reservoir(tasks[:index], self.config.memory_size, self._seed)
        return list(past_samples(tasks[:index], self.config.ratio, self._seed))


def past_samples(tasks: Sequence[Sequence[Encoded]], ratio: float, seed: int) -> Iterator[Encoded]:
    """Draw a share of every past task's samples, at least one of each, the same ones for every later task.

    Args:
        tasks: The past tasks' training samples, in the order of the stream.
        ratio: Share in [0, 1]; 0 draws nothing.
        seed: The run's seed; what is drawn follows from it and the task's position.
    """
    for position, samples in enumerate(tasks):
        count = min(len(samples), math.ceil(ratio * len(samples)))
        yield from random.Random(derive_seed(seed, "replay", position)).sample(list(samples), count)


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
