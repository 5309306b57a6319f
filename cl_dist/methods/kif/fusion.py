"""Fusion of old and new weights: unit scores, the share of new weights in each unit, and the weights mixed by it.

The formulas are those of KIF (arXiv 2408.05200) and TaSL (arXiv 2408.09857). Scores and shares are `(units,)` float64,
one per skill unit, unless stated otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from cl_dist.methods.kif.config import KifConfig
from cl_dist.methods.kif.units import UnitMap, spread
from cl_dist.methods.shared.kept_weights import KeptWeights


def minmax(scores: torch.Tensor) -> torch.Tensor:
    """Scale scores to [0, 1]. Equal scores all become 0, because no unit matters more than another."""
    low, high = scores.min(), scores.max()
    if low == high:
        return torch.zeros_like(scores)
    return (scores - low) / (high - low)


def accumulate(current: torch.Tensor, accumulated: torch.Tensor, new: float) -> torch.Tensor:
    """`new * current + (1 - new) * accumulated`; both are normalised, but the result is not."""
    return new * current + (1.0 - new) * accumulated


def adaptive_share(current: torch.Tensor, accumulated: torch.Tensor, tau: float) -> torch.Tensor:
    """KIF: e^(u/tau) / (e^(u/tau) + e^(past/tau)), written as a sigmoid so that a small tau cannot overflow.

    Args:
        current: The task's scores u, normalised.
        accumulated: The past tasks' scores, normalised.
        tau: Temperature, above 0.
    """
    return torch.sigmoid((current - accumulated) / tau)


def important(scores: torch.Tensor, threshold: float) -> torch.Tensor:
    """`(units,)` bool: scores above the (100 - threshold)th percentile, linearly interpolated (threshold in percent).

    Equal scores are either all important or all not; if all scores are equal, none is.
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
    """TaSL: 1 if a unit is important only to the task, 0 if only to the past, otherwise one of two constants.

    Args:
        current: The task's scores.
        accumulated: The past tasks' scores.
        threshold: Percentage of units, from the top, that are important.
        weight_new: Share of the new weights in units that are important to both.
        weight_neither: Share of the new weights in units that are important to neither.
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
    """Shares of new and of old in each unit, from two masks: (1, 0) if the unit is important only to the task, (0, 1)
    if only to the past.

    Args:
        current: The task's scores.
        accumulated: The past tasks' scores.
        threshold: Percentage of units, from the top, that are important.
        both: Shares in units that are important to both.
        neither: Shares in units that are important to neither.
    """
    return shares_of(important(current, threshold), important(accumulated, threshold), both=both, neither=neither)


def shares_of(
    now: torch.Tensor, before: torch.Tensor, *, both: tuple[float, float], neither: tuple[float, float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """`mask_shares` from the masks themselves: bool tensors of what is important to the task and to the past."""
    new, old = now.double(), before.double()
    for where, shares in ((now & before, both), (~now & ~before, neither)):
        new[where], old[where] = shares
    return new, old


class UnitScores:
    """Scores of the last finished task, filled in place after each task.

    Args:
        units: Number of skill units.
        config: The fusion's constants.
    """

    def __init__(self, units: int, config: KifConfig) -> None:
        self.config = config
        """Can be replaced between two tasks."""
        self.current = torch.zeros(units, dtype=torch.float64)
        """The task's scores u."""
        self.current_normalised = torch.zeros_like(self.current)
        """u, min-max normalised."""
        self.accumulated = torch.zeros_like(self.current)
        """Normalised u added to the previous accumulated scores; after the first task, u itself."""
        self.accumulated_normalised = torch.zeros_like(self.current)
        """The accumulated scores, min-max normalised: the weight of the past in the next task's fusion."""
        self.share_new = torch.zeros_like(self.current)
        """Share of the task's own weights in each unit after fusion; the first task is not fused (1)."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """All of them by name, live."""
        return {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}

    def take(self, scores: torch.Tensor, *, first: bool) -> None:
        """Advance to a finished task's scores; the `first` task of a stream has no past to be fused with."""
        config, past = self.config, self.accumulated_normalised.clone()
        self.current.copy_(scores)
        self.current_normalised.copy_(minmax(scores))
        now = self.current_normalised

        # The fusion weighs the task against the past as it was before the task.
        if first:
            share = torch.ones_like(now)
        elif config.fusion == "adaptive":
            share = adaptive_share(now, past, config.tau)
        else:
            share = hard_share(now, past, config.threshold, config.weight_new, config.weight_neither)
        self.share_new.copy_(share)

        # Then the task becomes a part of the past.
        self.accumulated.copy_(scores if first else accumulate(now, past, config.accumulate_new))
        self.accumulated_normalised.copy_(minmax(self.accumulated))


Mixture = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(values per element, kept weights, master weights) -> new master weights, all of the same elements."""


class MixedWeights(KeptWeights):
    """Kept weights that can be fused with the masters."""

    def mix(self, units: UnitMap, values: torch.Tensor, mixture: Mixture) -> None:
        """Replace the masters by `mixture`, without publishing them.

        Args:
            units: The skill units.
            values: `(units,)` float64: one number per unit, passed to the mixture once per element as float32.
            mixture: Computes the new weights from each element's number, kept weight and master weight.
        """
        for name, kept in self.shards.items():
            part, weights = units.parts[name], self.master(name)
            own = values[part.first : part.first + part.count].to(weights)
            for offset, each in spread(own, part, kept.start, kept.stop):
                new = weights.narrow(0, offset, each.numel())
                new.copy_(mixture(each, kept.data.narrow(0, offset, each.numel()).to(weights.device), new))
