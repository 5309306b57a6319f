"""How much every element that this rank owns matters to the task, smoothed over steps, and the scores of units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from cl_dist.config.methods import UnitConfig
from cl_dist.errors import ClDistError
from cl_dist.kernels import importance_update_
from cl_dist.methods.kif.units import CHUNK, Part, UnitMap, add_sums_
from cl_dist.sharding import Shard, ShardView

SMALL = 1 << 16
"""A shard of so many elements or fewer is updated together with its neighbours: adapters have hundreds of small ones,
and one call for each takes longer than the arithmetic."""

GROUP = 1 << 20
"""Elements that are updated together at most, for which weights and gradients are copied next to each other (8 MiB)."""


class _Group(NamedTuple):
    """Shards that are updated together, and their states."""

    names: tuple[str, ...]
    smoothed: torch.Tensor
    uncertainty: torch.Tensor


class Importance:
    """Smoothed importance and uncertainty as flat tensors along this rank's master weights.

    With p = w g from the float32 master weight and the reduced gradient before clipping, I is |p|, p^2 or |p - p^2/2|;
    smoothed = beta1 smoothed + (1 - beta1) I, then uncertainty = beta2 uncertainty + (1 - beta2) |I - smoothed|
    (arXiv 2408.05200, 2408.09857).

    Args:
        shards: The engine's shards.
        config: `order`, `beta1`, `beta2` and `importance_dtype` (of both tensors; arithmetic is in float32) are read.
    """

    def __init__(self, shards: ShardView, config: UnitConfig) -> None:
        self._shards, self._config = shards, config
        self._dtype = torch.bfloat16 if config.importance_dtype == "bfloat16" else torch.float32
        self.smoothed: dict[str, Shard] = {}
        """By parameter name; parameters of which this rank owns nothing are missing."""
        self.uncertainty: dict[str, Shard] = {}
        masters = ((name, shards.master(name)) for name in shards.names)
        owned = {name: master for name, master in masters if master is not None}
        self._groups = [self._lay_out({name: owned[name] for name in names}) for names in _grouped(owned)]

    def _lay_out(self, masters: Mapping[str, Shard]) -> _Group:
        """Make the states of some shards, one after the other in one piece of memory."""
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
        """Of both tensors together."""
        return 2 * self._dtype.itemsize

    @torch.no_grad()
    def update(self) -> None:
        """Take in the step's reduced gradient; between reduction and clipping."""
        for group in self._groups:
            masters = {name: self._shards.master(name) for name in group.names}
            weights = [master.data for master in masters.values() if master is not None]
            gradients = [self._gradient(name, master) for name, master in masters.items() if master is not None]
            importance_update_(
                _in_one_piece(weights),
                _in_one_piece(gradients),
                group.smoothed,
                group.uncertainty,
                beta1=self._config.beta1,
                beta2=self._config.beta2,
                order=self._config.order,
            )

    def reset(self) -> None:
        """Start from zero."""
        for shard in (*self.smoothed.values(), *self.uncertainty.values()):
            shard.data.zero_()

    def unit_scores(self, units: UnitMap, device: torch.device) -> torch.Tensor:
        """Score of every unit, `(units,)` float64 on the CPU, the same on all ranks (collective: one all-reduce).

        An element's score is smoothed * uncertainty, a unit's the mean over its elements. For a unit of two slices
        (a LoRA rank) it is the product of the two means, which is the mean of the outer product of their elements.

        Args:
            units: The skill units.
            device: Where collectives run.

        Raises:
            ClDistError: A score is not finite.
        """
        sums = {name: torch.zeros(part.count, dtype=torch.float64) for name, part in units.parts.items()}
        for name, smoothed in self.smoothed.items():
            sums[name] = self._element_sums(name, units.parts[name], smoothed).cpu()
        total = self._shards.sum_over_ranks(torch.cat(list(sums.values())).to(device)).cpu()
        scores = torch.ones(len(units), dtype=torch.float64)
        for part, slices in zip(units.parts.values(), total.split([s.numel() for s in sums.values()]), strict=True):
            scores[part.first : part.first + part.count] *= slices / part.elements
        if not scores.isfinite().all():
            raise ClDistError("the importance of a skill unit is not a finite number; lower train.learning_rate")
        return scores

    def _gradient(self, name: str, master: Shard) -> torch.Tensor:
        """The gradient of the elements of `master`, where they lie; zero where the parameter got none."""
        owned = self._shards.own_gradient(name)
        return torch.zeros_like(master.data) if owned is None else owned.data.to(master.data.device)

    def _element_sums(self, name: str, part: Part, smoothed: Shard) -> torch.Tensor:
        """`(part.count,)` float64: the scores of this rank's elements, added up per slice.

        The kernels' own sums do not fit. `rank_unit_scores` wants lora_A and lora_B whole, whereas a shard may end
        anywhere inside a row or column. `importance_update_` sums neighbouring elements alone, not columns. Both take
        the products in float32.
        """
        sums = torch.zeros(part.count, dtype=torch.float64, device=smoothed.data.device)
        pieces = zip(smoothed.data.split(CHUNK), self.uncertainty[name].data.split(CHUNK), strict=True)
        for number, (importance, uncertainty) in enumerate(pieces):
            # Float64: the product of two second-order numbers can be too small for float32.
            add_sums_(sums, importance.double() * uncertainty, smoothed.start + number * CHUNK, part)
        return sums


def _grouped(shards: Mapping[str, Shard]) -> list[list[str]]:
    """Names of shards that are updated together: small neighbours, up to `GROUP` elements; large ones by
    themselves.
    """
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
