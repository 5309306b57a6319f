"""Source-shielded updates (SSU, arXiv 2512.04844): the columns that matter most to the source are frozen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from cl_dist.heartbeat import beat
from cl_dist.methods.protocol import TaskPlace
from cl_dist.methods.selective.blocks import linear_weights, names_in_blocks
from cl_dist.methods.selective.method import Selective
from cl_dist.methods.shared.samples import evenly
from cl_dist.methods.ssu.inputs import mean_square_inputs
from cl_dist.models.kept_parts import Part
from cl_dist.sharding import whole_parameters


class Ssu(Selective):
    """A column's score is its norm times the mean square of its inputs; the highest are frozen for the task.

    Args:
        config: The method's entry in the recipe.
    """

    def parts(self, model: nn.Module) -> Sequence[Part]:
        """A share of the columns of every linear layer in the blocks."""
        self._in_blocks = names_in_blocks(model)
        sizes = linear_weights(model, "ssu")
        return [Part(name, "columns", size - int(size * (1 - self.config.keep))) for name, size in sizes.items()]

    def trains_rest(self, name: str) -> bool:
        """Embeddings and head, and perhaps the norms and biases."""
        return self.config.vectors == "trained" or name not in self._in_blocks

    def choose(self, place: TaskPlace) -> Mapping[str, torch.Tensor]:
        """Measure the samples, and keep the columns with the lowest scores; of equal ones the last."""
        assert place.probe is not None
        beat(f"measuring the calibration samples for task {place.name}")
        some = evenly(place.probe.data["calibration"], self.config.samples)
        layers = {part.part.weight: part.layers[0] for part in self._parts}
        inputs = mean_square_inputs(layers, some, place.probe)
        chosen = {}
        for part, weight in zip(self._parts, whole_parameters(self.model, list(layers)), strict=True):
            inner = inputs[part.part.weight] if self.config.inputs == "mean_square" else inputs[part.part.weight].sqrt()
            score = weight.double().norm(dim=1 - part.axis) * inner
            lowest = score.sort(stable=True, descending=True).indices[part.size - part.part.count :]
            chosen[part.part.weight] = lowest.sort().values
        return chosen
