"""Checks that keep bad weights from spreading: non-finite updates are stopped, and ranks that drift apart are found."""

from __future__ import annotations

import math
from typing import Any

import torch

from cl_dist.config.words import listed
from cl_dist.engine.device import device
from cl_dist.errors import JobFailed
from cl_dist.sharding import ShardView, replica_checksums

_SHOWN_SAMPLES = 64
_SHOWN_RANKS = 8


class UpdateGuard:
    """Decides with the other ranks whether a step may update the weights: only if losses and gradient are finite.

    Args:
        shards: The engine's shards.
        max_skipped: How many consecutive steps may skip their update.
    """

    def __init__(self, shards: ShardView, max_skipped: int) -> None:
        self._shards, self._max_skipped = shards, max_skipped
        self._in_a_row = 0
        self.begin("")

    def begin(self, where: str) -> None:
        """Begin a step; `where` names task and step in messages."""
        self._where = where
        self._totals: list[torch.Tensor] = []
        self._samples: list[list[int]] = []
        self._values: list[float] = []
        self.skipped: str | None = None
        """Why the step skipped its update; None: it did not."""

    def note_loss(self, total: torch.Tensor, indices: list[int]) -> None:
        """Record a micro-batch's loss, a scalar, with its samples; fillers are left out."""
        self._totals.append(total.detach())
        self._samples.append([index for index in indices if index >= 0])

    @property
    def losses(self) -> list[float]:
        """The step's losses so far. The host waits for the device here: once for all micro-batches, after backward."""
        if len(self._values) < len(self._totals):
            self._values = torch.stack(self._totals).tolist()
        return self._values

    def allows(self) -> bool:
        """Whether losses and reduced gradients are finite on all ranks (collective), between reduction and update.

        Raises:
            JobFailed: They are not, and `max_skipped` steps in a row were skipped before; on all ranks alike.
        """
        if self._all_finite():
            self._in_a_row = 0
            return True
        self._in_a_row += 1
        self.skipped = self._describe()
        if self._in_a_row <= self._max_skipped:
            return False
        before = ""
        if self._max_skipped > 0:
            before = f", and the {self._max_skipped} steps before it were already skipped (train.max_skipped_steps)"
        raise JobFailed(
            f"{self._where}: {self.skipped}{before}; no weight has changed in this step: lower train.learning_rate, "
            "check these samples, or continue with --resume and a larger train.max_skipped_steps"
        )

    def _all_finite(self) -> bool:
        # A rank whose loss is bad need not look at its gradient. The ranks agree by reducing one number.
        bad = torch.ones((), device=device())
        if all(map(math.isfinite, self.losses)):
            bad = (~self._shards.gradient_norm().isfinite()).to(bad)
        if torch.distributed.get_world_size() > 1:
            torch.distributed.all_reduce(bad)
        return bad.item() == 0

    def _describe(self) -> str:
        """Say what is not finite and on which samples: losses if any is bad, else a gradient (collective)."""
        own = {
            "losses": [
                (value, indices)
                for value, indices in zip(self.losses, self._samples, strict=True)
                if not math.isfinite(value)
            ],
            "samples": [index for indices in self._samples for index in indices],
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
        # No element may be bad either: the norm of finite elements can overflow.
        name = next((found["gradient"] for found in everyone if found["gradient"] is not None), None)
        of = "the norm of the gradient" if name is None else f"the gradient of {name}"
        samples = [index for found in everyone for index in found["samples"]]
        return f"{of} is not finite, though the loss is, on samples {listed(samples, _SHOWN_SAMPLES)}"


def check_replicas(model: torch.nn.Module, where: str) -> int:
    """Compare the parameters that every rank holds whole (collective), and return how many there are.

    `train.check_replicas_every` asks for it.

    Args:
        model: The module inside the engine, between two steps.
        where: Step and task, for the message.

    Raises:
        JobFailed: A parameter differs between ranks. All ranks raise it; the message names the first such parameter
            and which ranks agree.
    """
    names, sums = replica_checksums(model)
    world = torch.distributed.get_world_size()
    if world == 1 or not names:
        return len(names)
    lowest, highest = sums.clone(), sums.clone()
    torch.distributed.all_reduce(lowest, torch.distributed.ReduceOp.MIN)
    torch.distributed.all_reduce(highest, torch.distributed.ReduceOp.MAX)
    differing = (lowest != highest).nonzero()[:, 0].tolist()
    if not differing:
        return len(names)
    # Only now, once something differs, gather every rank's checksums and group the ranks by what they hold.
    everyone = [torch.zeros_like(sums) for _ in range(world)]
    torch.distributed.all_gather(everyone, sums)
    holders: dict[int, list[int]] = {}
    for rank, theirs in enumerate(everyone):
        holders.setdefault(int(theirs[differing[0]]), []).append(rank)
    groups = " and ".join(
        f"rank{'s' if len(ranks) > 1 else ''} {listed(ranks, _SHOWN_RANKS)}"
        for ranks in sorted(holders.values(), key=len, reverse=True)
    )
    more = f" (and {len(differing) - 1} more parameters)" if len(differing) > 1 else ""
    raise JobFailed(
        f"{where}: the ranks no longer hold the same weights: {names[differing[0]]}{more} differs between {groups}; "
        "a device or driver is probably broken, continue from the last saved state without it"
    )
