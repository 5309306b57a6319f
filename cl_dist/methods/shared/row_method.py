"""The base of methods that choose rows of some parameters in every step, from what its forward passes have shown."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cl_dist.config.schema import TrainConfig
from cl_dist.methods.protocol import Method
from cl_dist.methods.shared.kept_counts import QUANTITY, KeptCounts
from cl_dist.methods.shared.row_executor import RowExecutor
from cl_dist.models.structure import whole_shape
from cl_dist.sharding import Shard, ShardView
from cl_dist.state.run_folder import TaskFolder


class RowMethod(Method, ABC):
    """Masks, freezes and counts the rows that `choose` names; they run along a parameter's first dimension.

    Say in `prepare_model` which parameters (`self.names`), and override `choose`. The settings need `mask`: what a
    dropped row does (`RowExecutor`).
    """

    names: list[str]
    """Parameters of which rows are chosen; the others are updated as a whole."""

    @abstractmethod
    def choose(self) -> Mapping[str, torch.Tensor]:
        """Choose the step's rows, after its last forward pass: the same on all ranks (collective).

        Returns:
            By name, in the order of `names`, `(rows,)` bool on the model's device: the rows that are updated.
        """

    def prepare_model(self, model: nn.Module, seed: int) -> None:
        """Remember how much is trained; extend this to set `names`."""
        self._trainable = sum(whole_shape(each).numel() for each in model.parameters() if each.requires_grad)

    def attach(self, model: nn.Module, shards: ShardView, train: TrainConfig) -> None:
        """Set up what masks and counts."""
        self.shards, self._accumulates = shards, train.gradient_accumulation > 1
        self._executor = RowExecutor(model, shards, {}, dropped=self.config.mask, skips=False)
        rows = {name: shards.shape(name)[0] for name in self.names}
        self._counts = KeptCounts(rows, next(model.parameters()).device, shards.replicated)

    def before_step(self, step: int) -> None:
        """Begin a new record with a task's first step."""
        self._counts.begin(step)

    def before_backward(self, loss: torch.Tensor) -> torch.Tensor:
        """With one micro-batch, the step's rows are known now."""
        if not self._accumulates:
            self._keep = self.choose()
            self._executor.choose(self._keep)
        return loss

    def before_update(self) -> None:
        """With several, they are known now."""
        if self._accumulates:
            self._keep = self.choose()
        self._executor.apply(self._keep if self._accumulates else None)
        self._counts.add(torch.cat([self._keep[name] for name in self.names]))

    def after_update(self) -> None:
        """The step is over."""
        self._executor.end_step()

    def update_skipped(self) -> None:
        """The step is over, too."""
        self.after_update()

    def detach(self) -> None:
        """Remove the hooks."""
        self._executor.remove()

    def kept_share(self) -> float | None:
        """The kept rows, on average, and what else is trained."""
        updated = self._counts.updated({name: self.shards.numel(name) for name in self.shards.names})
        return None if updated is None else updated / self._trainable

    def write_results(self, folder: Path) -> None:
        """Write into the task's folder how often each row was kept."""
        self._counts.write(TaskFolder(folder).kept_rows, masked=True)

    def state_dict(self) -> dict[str, Any]:
        """Which steps the record of kept rows includes."""
        return {QUANTITY: self._counts.state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue the record."""
        self._counts.restore(state[QUANTITY])

    def tensors(self) -> dict[str, dict[str, Shard]]:
        """The record."""
        return {QUANTITY: self._counts.tensors()}

    def tensors_loaded(self) -> None:
        """Give every rank the whole record again."""
        self._counts.tensors_loaded()
