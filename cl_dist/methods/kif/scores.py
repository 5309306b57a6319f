"""The unit scores of a task and of the tasks so far, and what they make of fusion."""

from __future__ import annotations

import torch

from cl_dist.methods.kif.config import KifConfig
from cl_dist.methods.kif.fusion import accumulate, adaptive_share, hard_share, minmax


class UnitScores:
    """Scores of the last finished task, `(units,)` float64 each; the tensors are filled in place.

    Args:
        units: Number of skill units.
        config: The fusion's constants.
    """

    def __init__(self, units: int, config: KifConfig) -> None:
        self.config = config
        """May be replaced between two tasks."""
        self.current = torch.zeros(units, dtype=torch.float64)
        """The task's scores u."""
        self.current_normalised = torch.zeros_like(self.current)
        """u, min-max normalised."""
        self.accumulated = torch.zeros_like(self.current)
        """Normalised u and the accumulated scores before, added up; after the first task u itself."""
        self.accumulated_normalised = torch.zeros_like(self.current)
        """The accumulated scores, min-max normalised: what the next task's fusion weighs the past with."""
        self.share_new = torch.zeros_like(self.current)
        """Share of the task's own weights in every unit after fusion; the first task is not fused (1)."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """All of them by name, live."""
        return {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}

    def take(self, scores: torch.Tensor, *, first: bool) -> None:
        """Go on to the scores of the next task; the `first` task of a stream has no past."""
        past = self.accumulated_normalised.clone()
        self.current.copy_(scores)
        self.current_normalised.copy_(minmax(scores))
        now = self.current_normalised
        self.share_new.copy_(torch.ones_like(now) if first else self._share(now, past))
        self.accumulated.copy_(scores if first else accumulate(now, past, self.config.accumulate_new))
        self.accumulated_normalised.copy_(minmax(self.accumulated))

    def _share(self, now: torch.Tensor, past: torch.Tensor) -> torch.Tensor:
        config = self.config
        if config.fusion == "adaptive":
            return adaptive_share(now, past, config.tau)
        return hard_share(now, past, config.threshold, config.weight_new, config.weight_neither)
