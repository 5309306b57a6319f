"""How much each element that this rank owns matters to the task, smoothed over steps, and the scores of units."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import torch

from cl_dist.errors import ClDistError
from cl_dist.kernels import importance_update_
from cl_dist.methods.kif.config import UnitConfig
from cl_dist.methods.kif.units import CHUNK, UnitMap, add_sums_
from cl_dist.sharding import Shard, ShardView

SMALL = 1 << 16
"""Shards of up to this many elements are updated together with their neighbours: adapters have hundreds of small ones,
and separate calls take longer than the arithmetic."""

GROUP = 1 << 20
"""Most elements that are updated together. Their weights and gradients are first copied side by side (8 MiB)."""


class _Group(NamedTuple):
    """Shards that are updated together, with their states."""

    names: tuple[str, ...]
    smoothed: torch.Tensor
    uncertainty: torch.Tensor


class Importance:
    """Smoothed importance and uncertainty as flat tensors along this rank's master weights.

    With p = w g, from the float32 master weight w and its gradient g, the importance I of an element is |p|, p^2 or
    |p - p^2/2|. Each step computes smoothed = beta1 smoothed + (1 - beta1) I, and then
    uncertainty = beta2 uncertainty + (1 - beta2) |I - smoothed| (arXiv 2408.05200, 2408.09857).

    Args:
        shards: The engine's shards.
        dtype: Storage type of both tensors; arithmetic is in float32.
    """

    def __init__(self, shards: ShardView, dtype: Literal["float32", "bfloat16"]) -> None:
        self._shards = shards
        self._dtype = torch.bfloat16 if dtype == "bfloat16" else torch.float32
        self.smoothed: dict[str, Shard] = {}
        """By parameter name; parameters that this rank owns nothing of are missing."""
        self.uncertainty: dict[str, Shard] = {}
        masters = ((name, shards.master(name)) for name in shards.names)
        owned = {name: master for name, master in masters if master is not None}
        self._groups = [self._lay_out({name: owned[name] for name in names}) for names in _grouped(owned)]
        self._waiting: dict[tuple[str, ...], dict[str, torch.Tensor]] = {}

    def _lay_out(self, masters: Mapping[str, Shard]) -> _Group:
        """Allocate the states of some shards, one after the other in one piece of memory."""
        sizes = [master.data.numel() for master in masters.values()]
        device = next(iter(masters.values())).data.device
        group = _Group(tuple(masters), *(torch.zeros(sum(sizes), dtype=self._dtype, device=device) for _ in range(2)))
        for states, flat in ((self.smoothed, group.smoothed), (self.uncertainty, group.uncertainty)):
            pieces = zip(masters.items(), flat.split(sizes), strict=True)
            states.update({name: Shard(master.start, piece) for (name, master), piece in pieces})
        return group

    @property
    def elements(self) -> int:
        """Elements that this rank owns."""
        return sum(shard.data.numel() for shard in self.smoothed.values())

    @property
    def bytes_per_element(self) -> int:
        """Bytes of both tensors together."""
        return 2 * self._dtype.itemsize

    def update(self, config: UnitConfig) -> None:
        """Update with the step's reduced gradient, between reduction and clipping.

        Args:
            config: Supplies `order`, `beta1` and `beta2`.
        """
        for group in self._groups:
            self._update(group, [self._gradient(name, self._master(name)) for name in group.names], config)

    def update_stepped(self, gradients: Mapping[str, Shard], config: UnitConfig) -> None:
        """Update with what the optimiser has just stepped: the gradients of `SteppedGradients` and the updated weights.

        If the optimiser steps a group's parameters one after the other, the group waits for the last of them.
        """
        for group in self._groups:
            now = {name: gradients[name].data for name in group.names if name in gradients}
            seen = {**self._waiting.pop(group.names, {}), **now}
            if len(seen) == len(group.names):
                self._update(group, [seen[name] for name in group.names], config)
            elif seen:  # copies, because DeepSpeed frees these gradients before it steps the others
                self._waiting[group.names] = {name: gradient.clone() for name, gradient in seen.items()}

    @torch.no_grad()
    def _update(self, group: _Group, gradients: Sequence[torch.Tensor], config: UnitConfig) -> None:
        importance_update_(
            _in_one_piece([self._master(name).data for name in group.names]),
            _in_one_piece(gradients),
            group.smoothed,
            group.uncertainty,
            beta1=config.beta1,
            beta2=config.beta2,
            order=config.order,
        )

    def reset(self) -> None:
        """Reset both tensors to zero."""
        for shard in (*self.smoothed.values(), *self.uncertainty.values()):
            shard.data.zero_()

    def unit_scores(self, units: UnitMap, device: torch.device) -> torch.Tensor:
        """Score of each unit, `(units,)` float64 on the CPU, the same on all ranks (collective: one all-reduce).

        An element's score is smoothed * uncertainty, and a unit's score is the mean over its elements. For a unit of
        two slices (a LoRA rank), it is the product of the two means: the mean of the outer product of their elements.

        Args:
            units: The skill units.
            device: Where collectives run.

        Raises:
            ClDistError: A score is not finite.
        """
        sums = slice_sums(self._shards, units, self.element_scores, device)
        scores = torch.ones(len(units), dtype=torch.float64)
        for part, slices in zip(units.parts.values(), sums, strict=True):
            scores[part.first : part.first + part.count] *= slices / part.elements
        if not scores.isfinite().all():
            raise ClDistError("the importance of a skill unit is not a finite number; lower train.learning_rate")
        return scores

    def _master(self, name: str) -> Shard:
        master = self._shards.master(name)
        assert master is not None  # the groups name what this rank owns
        return master

    def _gradient(self, name: str, master: Shard) -> torch.Tensor:
        """The gradient of the elements of `master`, on their device; zero if the parameter got no gradient."""
        owned = self._shards.own_gradient(name)
        return torch.zeros_like(master.data) if owned is None else owned.data.to(master.data.device)

    def element_scores(self, name: str) -> Iterator[tuple[int, torch.Tensor]]:
        """Scores of this rank's elements of a parameter, in chunks: (offset, `(<= CHUNK,)` float64).

        Units are summed element by element, because a shard can end anywhere inside a row or column of lora_A or
        lora_B.
        """
        if name not in self.smoothed:
            return
        pieces = zip(self.smoothed[name].data.split(CHUNK), self.uncertainty[name].data.split(CHUNK), strict=True)
        for number, (importance, uncertainty) in enumerate(pieces):
            # The product of two second-order numbers can be too small for float32.
            yield number * CHUNK, importance.double() * uncertainty


def slice_sums(
    shards: ShardView,
    units: UnitMap,
    values: Callable[[str], Iterator[tuple[int, torch.Tensor]]],
    device: torch.device,
) -> Sequence[torch.Tensor]:
    """Sum elements' values over the slices of each parameter, on all ranks alike (collective: one all-reduce).

    Args:
        shards: The engine's shards.
        units: How the parameters are cut.
        values: Yields a parameter's values along this rank's master, in chunks with their offsets.
        device: Where collectives run.

    Returns:
        `(part.count,)` float64 on the CPU for each parameter, in the order of `units.parts`.
    """
    flat = torch.zeros(sum(part.count for part in units.parts.values()), dtype=torch.float64)
    parts = flat.split([part.count for part in units.parts.values()])
    for sums, (name, part) in zip(parts, units.parts.items(), strict=True):
        master = shards.master(name)
        if master is None:
            continue
        own = torch.zeros(part.count, dtype=torch.float64, device=master.data.device)
        for offset, chunk in values(name):
            add_sums_(own, chunk, master.start + offset, part)
        sums.copy_(own)
    return shards.sum_over_ranks(flat.to(device)).cpu().split([part.count for part in units.parts.values()])


def _grouped(shards: Mapping[str, Shard]) -> list[list[str]]:
    """Names of shards that are updated together: small neighbours, up to `GROUP` elements; large shards stay alone."""
    groups: list[list[str]] = []
    elements = GROUP
    for name, shard in shards.items():
        size = shard.data.numel()
        if size > SMALL or elements + size > GROUP:
            groups.append([])
            elements = 0 if size <= SMALL else GROUP
        groups[-1].append(name)
        elements += size
    return groups


def _in_one_piece(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat([tensor.reshape(-1) for tensor in tensors])
