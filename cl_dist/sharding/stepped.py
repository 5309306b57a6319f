"""What the inner optimiser has just stepped: updated masters, and beside them the clipped gradients they moved by.

After DeepSpeed's own step the gradients are gone, and the factor of clipping is known only inside it. A hook behind
the inner optimiser's `step` sees both, without a copy. ZeRO steps it once per parameter group (or sub-group), so the
hook is called with what was stepped that time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from cl_dist.sharding.shard import Shard
from cl_dist.sharding.view import ShardView

Take = Callable[[Mapping[str, Shard]], None]
"""Clipped gradients by parameter name, each along this rank's master weight; zero where a parameter got none."""


class SteppedGradients:
    """Calls `take` in every step of the inner optimiser.

    Args:
        shards: The engine's shards.
        take: Gets the gradients of what is being stepped; may be called several times a step, never twice with one
            parameter.
    """

    def __init__(self, shards: ShardView, take: Take) -> None:
        self._shards, self._take = shards, take
        self._handles = [each.register_step_post_hook(self._stepped) for each in shards.layout.optimizers]

    def remove(self) -> None:
        """Take the hooks out again."""
        for handle in self._handles:
            handle.remove()

    def _stepped(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        stepped = {id(param) for group in optimizer.param_groups for param in group["params"]}
        gradients = {}
        for name, param in self._shards.params.items():
            at = self._shards.layout.address(param)
            if at is not None and id(at.flat) in stepped:
                grad = at.flat.grad
                whole = torch.zeros_like(at.flat) if grad is None else grad
                gradients[name] = Shard(at.start, whole.detach().view(-1).narrow(0, at.offset, at.numel))
        self._take(gradients)
