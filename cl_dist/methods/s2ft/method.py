"""Structured sparse fine-tuning (S2FT, arXiv 2412.06289): random channels and heads, the same in coupled matrices."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise

import torch
from torch import nn

from cl_dist.errors import BadInput
from cl_dist.methods.protocol import TaskPlace
from cl_dist.methods.s2ft.units import Coupled, Kind, coupled
from cl_dist.methods.selective.method import Selective
from cl_dist.models.kept_parts import Part
from cl_dist.seeds import derive_seed

KINDS: tuple[Kind, Kind] = ("heads", "channels")


class S2ft(Selective):
    """Draws the units of a task from (seed, task), in every module a share of its own, and freezes everything else.

    Args:
        config: The method's entry in the recipe.
    """

    trains_bias = False

    def parts(self, model: nn.Module) -> Sequence[Part]:
        """The rows or columns of as many units as the share of all modules' units is, spread evenly over them."""
        self._drawn: list[tuple[Coupled, int]] = []
        for kind in KINDS:
            share = getattr(self.config, kind)
            groups = coupled(model, kind) if share else []
            ends = [int(share * number) for number in accumulate((each.units for each in groups), initial=0)]
            if share and not ends[-1]:
                raise BadInput(f"method.{kind}: {share:g} of the model's {kind} is none at all; allowed: more, or 0")
            self._drawn += zip(groups, [b - a for a, b in pairwise(ends)], strict=True)
        parts = [
            Part(group.weights[role], "columns" if role in ("output", "down") else "rows", count * group.widths[role])
            for group, count in self._drawn
            for role in group.weights
            if role in self.config.matrices and count
        ]
        if not parts:
            raise BadInput(f"method.matrices: the model has no {' or '.join(self.config.matrices)} matrix to train")
        return parts

    def trains_rest(self, name: str) -> bool:
        """Nothing else is trained."""
        return False

    def choose(self, place: TaskPlace) -> Mapping[str, torch.Tensor]:
        """Draw units for each module; a unit's rows and columns are side by side."""
        chosen = {}
        for group, count in self._drawn:
            draw = random.Random(derive_seed(self.seed, "s2ft", place.index, *group.weights.values()))
            units = torch.tensor(sorted(draw.sample(range(group.units), count)), dtype=torch.int64)
            for role, weight in group.weights.items():
                width = group.widths[role]
                chosen[weight] = (units[:, None] * width + torch.arange(width)).reshape(-1)
        return chosen
