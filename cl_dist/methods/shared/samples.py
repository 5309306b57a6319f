"""Samples beyond a task's own steps: what is drawn from past tasks, and how many can be measured at once."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from cl_dist.config.schema import TrainConfig
from cl_dist.errors import BadInput
from cl_dist.methods.config import share_of
from cl_dist.seeds import derive_seed
from cl_dist.tasks.samples import Samples, as_samples, join
from cl_dist.tasks.types import Encoded


def past_samples(tasks: Sequence[Sequence[Encoded]], ratio: float, seed: int) -> Samples:
    """Draw a share of each past task's samples, at least one per task. Every later task gets the same samples.

    They follow from the seed and the data alone, so nothing has to be saved.

    Args:
        tasks: The past tasks' training samples, in stream order.
        ratio: Share in [0, 1]; 0 draws nothing.
        seed: The run's seed; together with a task's position it determines the draw.
    """
    drawn = []
    for position in range(len(tasks) if ratio > 0 else 0):  # a task that is not looked up is not tokenised
        samples = as_samples(tasks[position])
        count = share_of(len(samples), ratio)
        draw = random.Random(derive_seed(seed, "replay", position))
        drawn.append(samples.pick(draw.sample(range(len(samples)), count)))
    return join(drawn)


def evenly(samples: Sequence[Encoded], most: int) -> list[Encoded]:
    """At most so many of the samples, at even distances; all of them if there are fewer."""
    number = min(most, len(samples))
    return [samples[each] for each in range(0, len(samples), len(samples) // number)][:number]


def global_batch(train: TrainConfig, ranks: int | None = None) -> int:
    """Samples of a full optimiser step over all ranks; None: those of this run."""
    count = torch.distributed.get_world_size() if ranks is None else ranks
    return train.micro_batch_size * train.gradient_accumulation * count


def check_fits_a_step(setting: str, samples: int, train: TrainConfig, ranks: int | None = None) -> None:
    """Raise BadInput if `method.<setting>` measures more samples at once than an optimiser step has memory for, on this
    run's ranks or a planned number of them.
    """
    largest = global_batch(train, ranks)
    if samples > largest:
        raise BadInput(
            f"method.{setting}: {samples} is more than the {largest} samples of an optimiser step "
            "(train.micro_batch_size * train.gradient_accumulation * ranks), the most that can be measured at once; "
            f"allowed: 1 to {largest}"
        )
