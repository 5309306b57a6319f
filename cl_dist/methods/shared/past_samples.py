"""Samples of past tasks. Which ones follows from the recipe's seed and the samples alone: nothing has to be saved."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence

from cl_dist.seeds import derive_seed
from cl_dist.tasks.types import Encoded


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
