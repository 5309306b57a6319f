"""Sparse memory fine-tuning (arXiv 2510.15103): of each table, the rows with the highest TF-IDF in the step's batch."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import TYPE_CHECKING

import torch
from torch import nn

from cl_dist.config.schema import TrainConfig
from cl_dist.heartbeat import beat
from cl_dist.methods.cost import Cost, RankShare
from cl_dist.methods.protocol import TaskPlace
from cl_dist.methods.shared.kept_counts import BYTES
from cl_dist.methods.shared.row_executor import frozen_rows
from cl_dist.methods.shared.row_method import RowMethod
from cl_dist.methods.shared.samples import evenly
from cl_dist.methods.sparse_memory.uses import TableUses, embedding_tables
from cl_dist.sharding import ShardView

if TYPE_CHECKING:
    from cl_dist.tasks.collate import Batch

_PER_ROW = 3 * 8 + 1 + BYTES
"""Bytes of a row's uses on this rank and on all, of its rarity, its mask and the record."""


class SparseMemory(RowMethod):
    """The term frequency is that of the whole batch, over all ranks; rarity is measured once, on background samples.

    Args:
        config: The method's entry in the recipe.
    """

    def prepare_model(self, model: nn.Module, seed: int) -> None:
        """Find the tables, and freeze everything else unless the recipe trains it."""
        super().prepare_model(model, seed)
        self._tables = embedding_tables(model, self.config.parameters)
        self.names = list(self._tables)
        for name, parameter in model.named_parameters() if self.config.rest == "frozen" else ():
            parameter.requires_grad_(name in self._tables)

    def cost(self, share: RankShare) -> Cost:
        """Counts of every row and their sum over the ranks, and with `mask: update` an optimiser that leaves the
        other rows alone.
        """
        rows = {name: share.shapes[name][0] for name in self.names}
        dropped = sum(max(0.0, 1 - self.config.rows / rows[name]) * share.owned.get(name, 0) for name in self.names)
        frozen = frozen_rows(dropped if self.config.mask == "update" else 0)
        return frozen + Cost(
            device={"sparse_memory's counts": _PER_ROW * sum(rows.values())},
            saved=BYTES * sum(rows.values()) // (1 if share.replicated else share.world),
            step=(share.all_reduce(8 * sum(rows.values()), "sparse_memory's counts"),),
        )

    def attach(self, model: nn.Module, shards: ShardView, train: TrainConfig) -> None:
        """Hook the tables."""
        super().attach(model, shards, train)
        self._uses = TableUses(self._tables, next(model.parameters()).device)
        self._rarity: torch.Tensor | None = None

    def before_trial(self, token_masks: Mapping[str, torch.Tensor]) -> None:
        """Record how the tables are used."""
        self._uses.learn(token_masks)

    def after_trials(self, idle: Set[str]) -> None:
        """Refuse tables that are not looked up by tokens."""
        self._uses.learnt()

    def before_task(self, place: TaskPlace) -> None:
        """The probe measures the background."""
        self._place = place

    def before_step(self, step: int) -> None:
        """Measure the background before the first step, and again after a resume: it does not depend on the weights."""
        super().before_step(step)
        if self._rarity is None:
            assert self._place.probe is not None
            beat("measuring the background samples")
            samples = evenly(self._place.probe.data["background"], self.config.samples)
            used = self._uses.background(samples, self._place.probe)
            self._rarity = torch.log((len(samples) + 1) / (used.double() + 1))
            torch.distributed.broadcast(self._rarity, 0)  # another kind of processor may round a logarithm otherwise
        self._uses.clear()

    def before_forward(self, step: int, batch: Batch) -> None:
        """Count the uses by real tokens."""
        self._uses.begin(batch.token_masks)

    def choose(self) -> dict[str, torch.Tensor]:
        """The rows of highest TF-IDF in each table, of equal ones the first; never one that the batch does not use."""
        assert self._rarity is not None
        keep, rarity = {}, self._uses.by_table(self._rarity)
        for name, used in self._uses.by_table(self._uses.total()).items():
            scores = used.double() / used.sum() * rarity[name]
            keep[name] = torch.zeros_like(used, dtype=torch.bool)
            keep[name][scores.sort(descending=True, stable=True).indices[: self.config.rows]] = True
            keep[name] &= used > 0
        return keep

    def detach(self) -> None:
        """Remove the hooks."""
        super().detach()
        self._uses.remove()
