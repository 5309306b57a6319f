"""Layerwise importance sampled AdamW (LISA, arXiv 2403.17919): all blocks rest but a few, which are drawn anew."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from torch import nn

from cl_dist.config.schema import TrainConfig
from cl_dist.errors import BadInput
from cl_dist.methods.cost import Cost, RankShare
from cl_dist.methods.protocol import Method, TaskPlace
from cl_dist.methods.shared.row_executor import RowExecutor, frozen_rows
from cl_dist.models.structure import is_below, separate_blocks
from cl_dist.seeds import derive_seed
from cl_dist.sharding import ShardView

if TYPE_CHECKING:
    from cl_dist.tasks.collate import Batch


class Lisa(Method):
    """Draws the blocks of an interval from (seed, task, interval): the same on all ranks, and after a resume.

    Args:
        config: The method's entry in the recipe.
    """

    def prepare_model(self, model: nn.Module, seed: int) -> None:
        """Find the blocks."""
        self._seed = seed
        self._blocks = separate_blocks(model, "lisa")
        if len(self._blocks) < self.config.blocks:
            raise BadInput(
                f"method.blocks: {self.config.blocks} is more than the model has; allowed: at most {len(self._blocks)}"
            )

    def cost(self, share: RankShare) -> Cost:
        """Neither backward nor the optimiser touches the resting blocks."""
        names = [name for name in share.shapes if is_below(name, self._blocks)]
        rest = 1 - self.config.blocks / len(self._blocks)
        resting = frozen_rows(rest * sum(share.owned.get(name, 0) for name in names))
        return resting + Cost(skipped=dict.fromkeys(names, rest))

    def attach(self, model: nn.Module, shards: ShardView, train: TrainConfig) -> None:
        """Resting blocks keep weights and moments."""
        self._shards = shards
        self._executor = RowExecutor(model, shards, {}, dropped="update", skips=False)

    def before_task(self, place: TaskPlace) -> None:
        """Intervals are counted from a task's first step."""
        self._place = place

    def resting(self, step: int) -> dict[str, nn.Module]:
        """The blocks that step `step` of the task does not train, by name."""
        draw = random.Random(derive_seed(self._seed, "lisa", self._place.index, step // self.config.interval))
        trained = draw.sample(list(self._blocks), self.config.blocks)
        return {name: block for name, block in self._blocks.items() if name not in trained}

    def before_forward(self, step: int, batch: Batch) -> None:
        """From here on, so that measurements before the step see the gradients of all blocks."""
        self._executor.rest(self.resting(step))

    def before_update(self) -> None:
        """Freeze the resting blocks."""
        self._executor.apply()

    def after_update(self) -> None:
        """Let all blocks train again."""
        self._executor.end_step()

    update_skipped = after_update

    def detach(self) -> None:
        """Remove the hooks."""
        self._executor.remove()

    def kept_share(self) -> float:
        """Everything but the blocks that rest, on average over the steps of the task."""
        sizes = {name: self._shards.numel(name) for name in self._shards.names}
        rested = 0
        for step in range(self._place.steps):
            resting = self.resting(step)
            rested += sum(size for name, size in sizes.items() if is_below(name, resting))
        return 1 - rested / (self._place.steps * sum(sizes.values()))
