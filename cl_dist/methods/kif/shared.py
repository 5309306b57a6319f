"""What KIF, TaSL and Recurrent-KIF have in common: skill units, importance of the task in hand, the penalty."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from cl_dist.config.methods import UnitConfig
from cl_dist.config.schema import TrainConfig
from cl_dist.methods.base import Method
from cl_dist.methods.kif.importance import Importance
from cl_dist.methods.kif.orthogonal import Orthogonality
from cl_dist.methods.kif.results import write_scores
from cl_dist.methods.kif.units import UnitMap
from cl_dist.models.names import LORA_A
from cl_dist.models.tracked import row_layouts
from cl_dist.sharding import Shard, ShardView


class UnitMethod(Method):
    """A method that scores skill units while it trains.

    Args:
        config: The recipe's `method` entry.
    """

    def __init__(self, config: UnitConfig) -> None:
        self._unit_config = config
        self.keeps_unfused = config.keep_unfused

    def attach(self, model: torch.nn.Module, shards: ShardView, train: TrainConfig) -> None:
        """Cut the model into units and lay importance out along the shards; a rebuilt engine begins with none."""
        config, lora = self._unit_config, any(LORA_A in name for name in shards.names)
        self._shards, self._device, self._seed = shards, next(model.parameters()).device, train.seed
        shapes = {name: tuple(shards.shape(name)) for name in shards.names}
        self.units = UnitMap.build(shapes, config.units_for(lora), row_layouts(model))
        self.importance = Importance(shards, config)
        self._orthogonality = Orthogonality(shards, config.orthogonal_for(lora), self._device)

    def before_update(self) -> None:
        """Add the penalty's gradient, then take the step's importance."""
        self._orthogonality.add_gradient()
        self.importance.update()

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
            f"{self._unit_config.name}: {len(self.units)} skill units ({first} is the first); importance takes "
            f"{each * owned} bytes on this rank ({each} for each of its {owned} parameters), "
            f"{weights} {4 * copies * owned} bytes of CPU memory"
        )
