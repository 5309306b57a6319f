"""Stands in for the fused kernel of the same name."""

from __future__ import annotations

import torch


def importance_update_(
    param: torch.Tensor,
    grad: torch.Tensor,
    smoothed: torch.Tensor,
    uncertainty: torch.Tensor,
    *,
    beta1: float = 0.85,
    beta2: float = 0.85,
    order: str = "mixed",
) -> None:
    """Update both states of a flat shard in place."""
    p = param.float() * grad.float()
    importance = {"first": p, "second": p * p, "mixed": p - p * p / 2}[order].abs_()
    smoothed.lerp_(importance, 1 - beta1)
    uncertainty.lerp_((importance - smoothed).abs_(), 1 - beta2)
