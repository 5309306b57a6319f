"""The training loss of each model family, as a sum over targets, and the positions whose logits it needs."""

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


def predicting_positions(labels: torch.Tensor) -> torch.Tensor:
    """Return the positions whose logits predict a target somewhere in a decoder's batch, `(kept,)` int64, never empty.

    Position t predicts the label at t + 1. Answers are short and prompts long, so the output head runs over a few
    positions instead of all.

    Args:
        labels: `(batch, length)` int64, not shifted.
    """
    positions = (labels[:, 1:] != IGNORE).any(dim=0).nonzero()[:, 0]
    return positions if len(positions) else positions.new_zeros(1)


def keeps_logits(model: torch.nn.Module) -> bool:
    """Whether the model's forward can compute logits at chosen positions only (`logits_to_keep`)."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters
