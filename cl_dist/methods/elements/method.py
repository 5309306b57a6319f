"""The base of methods that choose elements in every step, once the gradients are reduced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from math import prod
from typing import Any

from torch import nn

from cl_dist.config.schema import TrainConfig
from cl_dist.config.words import listed
from cl_dist.errors import BadInput
from cl_dist.methods.cost import Cost, RankShare
from cl_dist.methods.protocol import Method
from cl_dist.methods.shared.largest import DIGIT, PASSES, Cut, largest, ranks_of
from cl_dist.models.structure import head_prefixes, is_below
from cl_dist.sharding import Shard, ShardView

_INT64 = 8  # bytes
SHOWN = 12
"""Most names in a message."""


class Elements(Method):
    """Finds the elements of largest score in each parameter, over all ranks. Derive from it, and say what to score."""

    def attach(self, model: nn.Module, shards: ShardView, train: TrainConfig) -> None:
        """Remember the shards, and which parameters to choose elements of."""
        self.shards = shards
        self.names = chosen_parameters(model, {name: shards.shape(name) for name in shards.names}, self.config)
        self._ranks = ranks_of(shards.replicated, next(model.parameters()).device)

    def largest(self, scores: Mapping[str, Shard]) -> dict[str, Cut]:
        """Where to cut each parameter in `names`, the same on all ranks (collective).

        Args:
            scores: This rank's scores, aligned with its masters; a parameter that it owns nothing of is missing.
        """
        counts = {name: kept_elements(self.shards.numel(name), self.config.keep) for name in self.names}
        return largest(scores, counts, self._ranks)

    def cost(self, share: RankShare) -> Cost:
        """Counts of the elements' values, summed over the ranks; every score is read in each pass over them, in the
        precision of `score_bytes`. `stepping_bytes` for each element of the owned masters are held during the step.
        """
        names = chosen_parameters(share.model, share.shapes, self.config)
        owned = sum(share.owned.get(name, 0) for name in names)
        calls = PASSES * self.searches
        counts = share.all_reduce(calls * len(names) * (_INT64 << DIGIT), f"{self.config.name}'s counts", calls)
        read = (PASSES + 1) * self.score_bytes(share) * owned
        copies = self.stepping_bytes * owned
        return Cost(
            stepping={f"{self.config.name}'s copies": copies} if copies else {},
            step=() if share.replicated else (counts,),
            traffic=read + 3 * copies,  # copied, read again and written back
        )

    searches = 1
    """How often a step searches for the largest elements."""
    stepping_bytes = 0
    """Bytes of copies of each owned element while the optimiser steps."""

    def score_bytes(self, share: RankShare) -> int:
        """Bytes of a score."""
        return 4


def kept_elements(numel: int, keep: float) -> int:
    """Number of elements kept of `numel`."""
    return max(1, int(numel * keep))


def chosen_parameters(model: nn.Module, shapes: Mapping[str, Sequence[int]], config: Any) -> list[str]:
    """Names of the trainable parameters of which `method.parameters` has elements chosen, in model order.

    Args:
        model: The model.
        shapes: Whole shapes of the trainable parameters, by name.
        config: The method's settings.

    Raises:
        BadInput: A pattern matches none, or none is left.
    """
    wanted = config.parameters
    if isinstance(wanted, str):
        chosen = [name for name in shapes if _covers(wanted, name, shapes[name], model)]
    else:
        for pattern in wanted:
            if not any(fnmatchcase(name, pattern) for name in shapes):
                raise BadInput(
                    f"method.parameters: {pattern} matches no trainable parameter; the model has "
                    f"{listed(list(shapes), SHOWN)}"
                )
        chosen = [name for name in shapes if any(fnmatchcase(name, pattern) for pattern in wanted)]
    if not chosen:
        raise BadInput(f"method.parameters: {wanted} covers no trainable parameter of this model; allowed: all")
    return chosen


def _covers(wanted: str, name: str, shape: Sequence[int], model: nn.Module) -> bool:
    if wanted == "matrices":
        return len(shape) >= 2 and prod(shape) > max(shape)
    module = model.get_submodule(name.rpartition(".")[0])
    # A LoRA adapter of an embedding is a parameter of its own module, and no table.
    table = isinstance(module, nn.Embedding) or is_below(name, head_prefixes(model))
    return wanted == "all" or not table
