"""SIFT: trains the elements with the largest gradient at the beginning of a task (arXiv 2312.11875)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random

import torch
from torch import nn

from cl_dist.config.schema import TrainConfig
from cl_dist.methods.protocol import TaskPlace
from cl_dist.methods.rehearsal import Rehearsal, Rehearsed
from cl_dist.methods.selective.gradients import WholeGradients
from cl_dist.methods.selective.method import Selective
from cl_dist.methods.shared.samples import check_fits_a_step, global_batch
from cl_dist.models.kept_parts import Part
from cl_dist.models.structure import whole_shape
from cl_dist.models.tracked import tracked_layers
from cl_dist.seeds import derive_seed
from cl_dist.sharding import ShardView


class Sift(Selective):
    """Sparse increment fine-tuning.

    Args:
        config: The method's entry in the recipe.
    """

    def parts(self, model: nn.Module) -> Sequence[Part]:
        """A share of the elements of each linear layer."""
        weights = [layer.weight for layer in tracked_layers(model, self.config.layers).values()]
        sizes = {weight: whole_shape(model.get_parameter(weight)).numel() for weight in weights}
        return [Part(name, "elements", min(int(self.config.keep * size) + 1, size)) for name, size in sizes.items()]

    def trains_rest(self, name: str) -> bool:
        """Whether other parameters are trained too."""
        return bool(self.config.rest == "trained")

    def attach(self, model: nn.Module, shards: ShardView, train: TrainConfig) -> None:
        """Check that the samples fit into a step."""
        super().attach(model, shards, train)
        if self.config.samples is not None:
            check_fits_a_step("samples", self.config.samples, train)
        self._samples = self.config.samples or global_batch(train)

    def rehearse(self, rehearsal: Rehearsal) -> Rehearsed:
        """Check that the samples fit into a step."""
        if self.config.samples is not None:
            check_fits_a_step("samples", self.config.samples, rehearsal.train, rehearsal.shards.ranks)
        return Rehearsed()

    def choose(self, place: TaskPlace) -> Mapping[str, torch.Tensor]:
        """The elements with the largest gradient on samples of the task. If it is not finite, others are drawn."""
        assert place.probe is not None
        own, attempt = place.probe.tasks[place.index], 0
        with WholeGradients(self._parts) as gradients:
            while not gradients.measured:
                draw = Random(derive_seed(self.seed, "first gradient", place.index, attempt))
                drawn = [own[each] for each in draw.sample(range(len(own)), min(self._samples, len(own)))]
                gradients.measure(place.probe, drawn, f"the first gradient (attempt {attempt + 1})")
                attempt += 1
            return gradients.largest()
