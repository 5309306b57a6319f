"""Half fine-tuning (HFT, arXiv 2404.18466): a random half of the matrices is frozen in every task."""

from __future__ import annotations

import random
from collections.abc import Iterator
from math import floor

from torch import nn

from cl_dist.methods.selective.method import Selective
from cl_dist.models.structure import block_prefixes
from cl_dist.models.tracked import is_matrix
from cl_dist.seeds import derive_seed


class Hft(Selective):
    """Draws the matrices of a task from (seed, task), the same on all ranks and after a resume.

    Args:
        config: The method's entry in the recipe.
    """

    def frozen(self, model: nn.Module, task: int) -> set[str]:
        """Of the modules of every kind in every block, the share that the task does not train."""
        draw = random.Random(derive_seed(self.seed, "hft", task))
        kinds: dict[str, list[list[str]]] = {}
        for kind, members in self._groups(model):
            kinds.setdefault(kind, []).append(members)
        frozen: set[str] = set()
        for groups in kinds.values():
            # Where the share is no whole number of modules, as many blocks round up as make it right on average.
            exact = [(1 - self.config.keep) * len(members) for members in groups]
            up = round(sum(exact)) - sum(floor(number) for number in exact)
            rounded_up = set(draw.sample([n for n, e in enumerate(exact) if e % 1], up)) if up else set()
            for number, members in enumerate(groups):
                frozen.update(draw.sample(members, floor(exact[number]) + (number in rounded_up)))
        return {parameter for parameter in self.whole if parameter.rpartition(".")[0] in frozen}

    def _groups(self, model: nn.Module) -> Iterator[tuple[str, list[str]]]:
        """The modules with parameters of each block, by kind: matrices of one parent module, and norms."""
        found: dict[tuple[str, str], dict[str, None]] = {}
        prefixes = block_prefixes(model)
        for parameter in self.whole:
            name = parameter.rpartition(".")[0]
            prefix = next((each for each in prefixes if name.startswith(each)), None)
            if prefix is not None:
                block, _, place = name.removeprefix(prefix).partition(".")
                matrix = is_matrix(model.get_parameter(f"{name}.weight"))
                kind = f"{prefix}{place.rpartition('.')[0]}" if matrix else f"{prefix}norms"
                found.setdefault((kind, f"{prefix}{block}"), {})[name] = None
        for (kind, _), members in found.items():
            yield kind, list(members)
