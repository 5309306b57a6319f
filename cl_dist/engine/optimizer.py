"""AdamW and the usual learning rate schedules."""

from __future__ import annotations

import math
from typing import Any

import torch

from cl_dist.config.schema import TrainConfig


def build_adamw(model: torch.nn.Module, train: TrainConfig) -> torch.optim.AdamW:
    """Build AdamW over the trainable parameters, with weight decay on matrices only.

    The learning rate starts at zero, because DeepSpeed's stage 0 in bfloat16 takes a step on zero gradients while it
    initialises, and that step would decay the weights. Every training step sets its own rate.
    """
    named = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for n, p in named if _is_decayed(n, p)], "weight_decay": train.weight_decay},
        {"params": [p for n, p in named if not _is_decayed(n, p)], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=0.0,
        betas=(train.beta1, train.beta2),
        eps=train.eps,
        fused=True,
    )


def _is_decayed(name: str, param: torch.nn.Parameter) -> bool:
    shape = getattr(param, "ds_shape", param.shape)  # under stage 3 `shape` is that of an empty placeholder
    return len(shape) >= 2 and not name.endswith(".bias")


def learning_rate(train: TrainConfig, step: int, total: int) -> float:
    """Return the learning rate at optimiser step `step` (0-based) of a task with `total` steps.

    Linear warm-up to `train.learning_rate`, then constant, or linear or cosine decay to zero at step `total`.
    """
    if step < train.warmup_steps:
        return train.learning_rate * (step + 1) / train.warmup_steps
    progress = (step - train.warmup_steps) / max(1, total - train.warmup_steps)
    if train.schedule == "linear":
        return train.learning_rate * (1.0 - progress)
    if train.schedule == "cosine":
        return train.learning_rate * 0.5 * (1.0 + math.cos(math.pi * progress))
    return train.learning_rate
