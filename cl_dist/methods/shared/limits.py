"""What a method may ask for in one reduced gradient."""

from __future__ import annotations

import torch

from cl_dist.config.schema import TrainConfig
from cl_dist.errors import BadInput


def global_batch(train: TrainConfig) -> int:
    """Samples of a full optimiser step over all ranks."""
    return train.micro_batch_size * train.gradient_accumulation * torch.distributed.get_world_size()


def check_fits_a_step(setting: str, samples: int, train: TrainConfig) -> None:
    """Raise BadInput where `method.<setting>` asks for a gradient of more samples than a step's memory is made for."""
    largest = global_batch(train)
    if samples > largest:
        raise BadInput(
            f"method.{setting}: {samples} is more than the {largest} samples of an optimiser step "
            "(train.micro_batch_size * train.gradient_accumulation * ranks), which are measured together at most; "
            f"allowed: 1 to {largest}"
        )
