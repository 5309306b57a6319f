"""The training loss, as a sum over targets."""

from __future__ import annotations

import inspect

import torch
from torch.nn.functional import cross_entropy

from cl_dist.tasks.types import IGNORE


def loss_sum(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the summed cross-entropy over all targets, float32 scalar.

    Args:
        logits: `(..., classes)`, any floating dtype.
        labels: int64 of the leading shape of `logits`; IGNORE takes no part.
    """
    flat = logits.reshape(-1, logits.shape[-1]).float()
    return cross_entropy(flat, labels.reshape(-1), ignore_index=IGNORE, reduction="sum")


def keeps_logits(model: torch.nn.Module) -> bool:
    """Whether the model's forward can compute logits at chosen positions only (`logits_to_keep`)."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters
