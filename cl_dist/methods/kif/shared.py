"""What KIF, TaSL and Recurrent-KIF have in common: skill units, importance of the task in hand, the penalty."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from cl_dist.config.schema import TrainConfig
from cl_dist.methods.kif.config import UnitConfig
from cl_dist.methods.kif.importance import Importance
from cl_dist.methods.kif.orthogonal import Orthogonality
from cl_dist.methods.kif.results import write_scores
from cl_dist.methods.kif.units import UnitMap
from cl_dist.methods.protocol import Method, TaskPlace
from cl_dist.models.lora import LORA_A
from cl_dist.models.tracked import row_layouts
from cl_dist.sharding import Shard, ShardView, SteppedGradients


class UnitMethod(Method):
    """A method that scores skill units while it trains.

    Args:
        config: The recipe's `method` entry.
    """

    def __init__(self, config: UnitConfig) -> None:
        super().__init__(config)
        self.config: UnitConfig
        self.keeps_unfused = config.keep_unfused

    def attach(self, model: torch.nn.Module, shards: ShardView, train: TrainConfig) -> None:
        """Cut the model into units and lay importance out along the shards; a rebuilt engine begins with none."""
        config, self._lora = self.config, any(LORA_A in name for name in shards.names)
        self._shards, self._device, self._seed = shards, next(model.parameters()).device, train.seed
        shapes = {name: tuple(shards.shape(name)) for name in shards.names}
        self.units = UnitMap.build(shapes, config.units_for(self._lora), row_layouts(model))
        self.importance = Importance(shards, config.importance_dtype)
        self._stepped = SteppedGradients(shards, self._take_stepped) if config.importance_at == "after_update" else None
        self._measured: Importance | None = None
        """Whose importance the step's is to be, once the optimiser has stepped."""

    def detach(self) -> None:
        """Take the hook out of the optimiser."""
        if self._stepped is not None:
            self._stepped.remove()

    def before_task(self, place: TaskPlace) -> None:
        """Lay out the penalty, whose weight the task may have to itself."""
        self._orthogonality = Orthogonality(self._shards, self.config.orthogonal_for(self._lora), self._device)

    def before_update(self) -> None:
        """Add the penalty's gradient, then take the step's importance."""
        self._orthogonality.add_gradient()
        self._take_importance(self.importance)

    def _take_importance(self, importance: Importance) -> None:
        """Take the step's importance into `importance`: now, or when the optimiser has stepped."""
        if self._stepped is None:
            importance.update(self.config)
        else:
            self._measured = importance

    def _take_stepped(self, gradients: Mapping[str, Shard]) -> None:
        if self._measured is not None:
            self._measured.update_stepped(gradients, self.config)

    def after_update(self) -> None:
        """The step's importance is taken."""
        self._measured = None

    def write_results(self, folder: Path) -> None:
        """Leave units and scores in the task's folder."""
        write_scores(folder, self.units, self.score_tensors())

    def score_tensors(self) -> Mapping[str, torch.Tensor]:
        """The last task's scores by name, `(units,)` float64 each, live."""
        raise NotImplementedError

    def _scores_to_save(self) -> dict[str, Shard]:
        """The scores as a part of the state; every rank holds them whole."""
        return {name: Shard(0, tensor) for name, tensor in self.score_tensors().items()}

    def _memory_message(self, states: int, copies: int) -> str:
        """What `states` pairs of importance and deviation and `copies` of the weights cost this rank."""
        owned, first = self.importance.elements, next(iter(self.units.names), "")
        each = states * self.importance.bytes_per_element
        weights = "the previous task's weights" if copies == 1 else f"{copies} copies of the weights"
        return (
            f"{self.config.name}: {len(self.units)} skill units ({first} is the first); importance takes "
            f"{each * owned} bytes on this rank ({each} for each of its {owned} parameters), "
            f"{weights} {4 * copies * owned} bytes of CPU memory"
        )
