"""From unit scores to the share of new weights in every unit: pure functions of tensors (arXiv 2408.05200, 2408.09857).

Scores are `(units,)` float64, one per skill unit. All results are too, unless said otherwise.
"""

from __future__ import annotations

import math

import torch


def minmax(scores: torch.Tensor) -> torch.Tensor:
    """Scale scores to [0, 1]; all zero where all are equal, for then no unit matters more than another."""
    low, high = scores.min(), scores.max()
    if low == high:
        return torch.zeros_like(scores)
    return (scores - low) / (high - low)


def adaptive_share(current: torch.Tensor, accumulated: torch.Tensor, tau: float) -> torch.Tensor:
    """KIF: e^(u/tau) / (e^(u/tau) + e^(past/tau)), as a sigmoid so that a small tau cannot overflow.

    Args:
        current: The task's scores u, normalised.
        accumulated: The past tasks' scores, normalised.
        tau: Temperature, above 0.
    """
    return torch.sigmoid((current - accumulated) / tau)


def important(scores: torch.Tensor, threshold: float) -> torch.Tensor:
    """`(units,)` bool: scores above the (100 - threshold)th percentile, linearly interpolated (threshold in percent).

    Equal scores are all important or all not; where all are equal, none is.
    """
    ascending = scores.sort().values
    position = (100.0 - threshold) / 100.0 * (scores.numel() - 1)
    low = math.floor(position)
    cut = torch.lerp(ascending[low], ascending[min(low + 1, scores.numel() - 1)], position - low)
    return scores > cut


def hard_share(
    current: torch.Tensor,
    accumulated: torch.Tensor,
    threshold: float,
    weight_new: float,
    weight_neither: float,
) -> torch.Tensor:
    """TaSL: 1 where a unit is important to the task only, 0 where to the past only, else one of two constants.

    Args:
        current: The task's scores.
        accumulated: The past tasks' scores.
        threshold: Percentage of units, from the top, that are important.
        weight_new: Share of the new weights in what is important to both.
        weight_neither: Share of the new weights in what is important to neither.
    """
    both, neither = (weight_new, 1.0 - weight_new), (weight_neither, 1.0 - weight_neither)
    return mask_shares(current, accumulated, threshold, both=both, neither=neither)[0]


def mask_shares(
    current: torch.Tensor,
    accumulated: torch.Tensor,
    threshold: float,
    *,
    both: tuple[float, float],
    neither: tuple[float, float],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Shares of new and of old in every unit, from two masks: (1, 0) where it is important to the task only, (0, 1)
    where to the past only.

    Args:
        current: The task's scores.
        accumulated: The past tasks' scores.
        threshold: Percentage of units, from the top, that are important.
        both: Shares in what is important to both.
        neither: Shares in what is important to neither.
    """
    return shares_of(important(current, threshold), important(accumulated, threshold), both=both, neither=neither)


def shares_of(
    now: torch.Tensor, before: torch.Tensor, *, both: tuple[float, float], neither: tuple[float, float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Shares of new and of old, float64, where two bool masks say what is important to the task and to the past."""
    new, old = now.double(), before.double()
    for where, shares in ((now & before, both), (~now & ~before, neither)):
        new[where], old[where] = shares
    return new, old


def accumulate(current: torch.Tensor, accumulated: torch.Tensor, new: float) -> torch.Tensor:
    """`new * current + (1 - new) * accumulated`, both normalised; the result is not yet."""
    return new * current + (1.0 - new) * accumulated
