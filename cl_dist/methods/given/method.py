"""Trains the rows, columns and parameters that a file of the user's names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from cl_dist.methods.given.names import Entry, matched, read_file
from cl_dist.methods.protocol import TaskPlace
from cl_dist.methods.selective.method import Selective
from cl_dist.models.kept_parts import Part


class Given(Selective):
    """Trains what `method.file` names, the same in every task.

    Args:
        config: The method's entry in the recipe.
    """

    def parts(self, model: nn.Module) -> Sequence[Part]:
        """The weights of which the file names rows or columns."""
        self._entries: Mapping[str, Entry] = matched(read_file(self.config.file), model, self.config.file)
        parts = {name: entry for name, entry in self._entries.items() if entry.along is not None}
        return [Part(name, entry.along, len(entry.numbers)) for name, entry in parts.items() if entry.along]

    def choose(self, place: TaskPlace) -> Mapping[str, torch.Tensor]:
        """The file's numbers."""
        return {name: torch.tensor(entry.numbers) for name, entry in self._entries.items() if entry.along}

    def trains_rest(self, name: str) -> bool:
        """What the file names as a whole, and with `rest: trained` everything else."""
        return name in self._entries or self.config.rest == "trained"
