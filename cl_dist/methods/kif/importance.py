"""How much every element that this rank owns matters to the task, smoothed over steps, and the scores of units."""

from __future__ import annotations

import torch

from cl_dist.config.schema import KifConfig
from cl_dist.errors import ClDistError
from cl_dist.kernels import importance_update_
from cl_dist.methods.kif.units import CHUNK, Part, UnitMap, add_sums_
from cl_dist.sharding import Shard, ShardView


class Importance:
    """Smoothed importance and uncertainty as flat float32 tensors along this rank's master weights.

    With p = w g from the float32 master weight and the reduced gradient before clipping, I is |p|, p^2 or |p - p^2/2|;
    smoothed = beta1 smoothed + (1 - beta1) I, then uncertainty = beta2 uncertainty + (1 - beta2) |I - smoothed|
    (arXiv 2408.05200, 2408.09857).

    Args:
        shards: The engine's shards.
        config: `order`, `beta1` and `beta2` are read.
    """

    def __init__(self, shards: ShardView, config: KifConfig) -> None:
        self._shards, self._config = shards, config
        self.smoothed = self._zeros()
        self.uncertainty = self._zeros()

    @property
    def elements(self) -> int:
        """Elements that this rank owns."""
        return sum(shard.data.numel() for shard in self.smoothed.values())

    @torch.no_grad()
    def update(self) -> None:
        """Take in the step's reduced gradient; between reduction and clipping."""
        for name, smoothed in self.smoothed.items():
            master = self._shards.master(name)
            assert master is not None  # it was there when the engine was built
            importance_update_(
                master.data,
                self._gradient(name, master),
                smoothed.data,
                self.uncertainty[name].data,
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
        total = self._sum_over_ranks(torch.cat(list(sums.values())), device)
        scores = torch.ones(len(units), dtype=torch.float64)
        for part, slices in zip(units.parts.values(), total.split([s.numel() for s in sums.values()]), strict=True):
            scores[part.first : part.first + part.count] *= slices / part.elements
        if not scores.isfinite().all():
            raise ClDistError("the importance of a skill unit is not a finite number; lower train.learning_rate")
        return scores

    def _zeros(self) -> dict[str, Shard]:
        masters = ((name, self._shards.master(name)) for name in self._shards.names)
        return {
            name: Shard(master.start, torch.zeros_like(master.data, dtype=torch.float32))
            for name, master in masters
            if master is not None
        }

    def _gradient(self, name: str, master: Shard) -> torch.Tensor:
        """The gradient of the elements of `master`, where they lie; zero where the parameter got none."""
        gradient = self._shards.gradient(name)
        if gradient is None:
            return torch.zeros_like(master.data)
        owned = gradient.data.narrow(0, master.start - gradient.start, master.data.numel())
        return owned.to(master.data.device)

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

    def _sum_over_ranks(self, sums: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Whole sums out of the ranks' parts; where every rank has all of them, those of rank 0, to the last bit."""
        sums = sums.to(device)
        if self._shards.replicated:
            torch.distributed.broadcast(sums, src=0)
        else:
            torch.distributed.all_reduce(sums)
        return sums.cpu()
