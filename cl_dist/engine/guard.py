"""Keeps NaN and infinity out of the weights: loss and gradient are looked at before every update."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from cl_dist.config.words import listed
from cl_dist.engine.distributed import device
from cl_dist.errors import JobFailed
from cl_dist.sharding import ShardView

_SHOWN_SAMPLES = 64


@dataclass(frozen=True)
class _Loss:
    """Of one micro-batch."""

    value: float
    indices: list[int]
    """Its samples; fillers are left out."""
    finite: bool


class UpdateGuard:
    """Decides, together with the other ranks, whether a step may update the weights.

    Args:
        shards: The engine's shards.
        max_skipped: How many steps in a row may be left out.
    """

    def __init__(self, shards: ShardView, max_skipped: int) -> None:
        self._shards, self._max_skipped = shards, max_skipped
        self._in_a_row = 0
        self.begin("")

    def begin(self, where: str) -> None:
        """A step begins; `where` names task and step in messages."""
        self._where = where
        self._losses: list[_Loss] = []
        self.skipped: str | None = None
        """Why the step's update was left out; None: it was not."""

    def note_loss(self, total: torch.Tensor, indices: list[int]) -> float:
        """Take in a micro-batch's loss, a scalar, with its samples; returns it as a number."""
        value = total.item()
        self._losses.append(_Loss(value, [index for index in indices if index >= 0], bool(torch.isfinite(total))))
        return value

    def allows(self) -> bool:
        """Whether losses and reduced gradients of all ranks are finite (collective), between reduction and update.

        Raises:
            JobFailed: They are not, and as many steps as may be were skipped just before; on all ranks alike.
        """
        if self._all_finite():
            self._in_a_row = 0
            return True
        self._in_a_row += 1
        self.skipped = self._describe()
        if self._in_a_row > self._max_skipped:
            raise JobFailed(self._last_words())
        return False

    def _all_finite(self) -> bool:
        """Of all ranks; one number is reduced, so that every rank gets the same answer."""
        bad = torch.ones((), device=device())
        if all(loss.finite for loss in self._losses):
            bad = (~self._shards.gradient_norm().isfinite()).to(bad)
        if torch.distributed.get_world_size() > 1:
            torch.distributed.all_reduce(bad)
        return bad.item() == 0

    def _describe(self) -> str:
        """What is not finite, and on which samples (collective)."""
        own = {
            "losses": [(loss.value, loss.indices) for loss in self._losses if not loss.finite],
            "samples": [index for loss in self._losses for index in loss.indices],
            "gradient": self._shards.non_finite_gradient(),
        }
        everyone: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyone, own)
        losses = [
            f"the loss is {value} on samples {listed(indices, _SHOWN_SAMPLES)} (rank {rank})"
            for rank, found in enumerate(everyone)
            for value, indices in found["losses"]
        ]
        if losses:
            return ", ".join(losses)
        name = next(_names(everyone), None)
        of = "the norm of the gradient" if name is None else f"the gradient of {name}"
        samples = [index for found in everyone for index in found["samples"]]
        return f"{of} is not finite, though the loss is, on samples {listed(samples, _SHOWN_SAMPLES)}"

    def _last_words(self) -> str:
        before = ""
        if self._max_skipped > 0:
            before = f", and the {self._max_skipped} before it were skipped already (train.max_skipped_steps)"
        return (
            f"{self._where}: {self.skipped}{before}; no weight has changed in this step: lower train.learning_rate, "
            "look at these samples, or go on with --resume and a larger train.max_skipped_steps"
        )


def _names(everyone: list[Any]) -> Iterator[str]:
    return (found["gradient"] for found in everyone if found["gradient"] is not None)
