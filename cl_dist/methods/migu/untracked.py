"""Weights that MIGU would train without a mask, reported by name and share before training."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Literal

from torch import nn

from cl_dist.config.words import listed, percent
from cl_dist.errors import BadInput
from cl_dist.models.tracked import any_block, block_parameters, tables_in_blocks

SHOWN = 8
"""Most names in a message."""


class Untracked:
    """Trainable matrices inside the blocks that cannot be masked.

    Args:
        numel: Elements of a trainable parameter, by its name.
        model: The model.
        owners: Type of the module that owns the parameter, by parameter name.
        unnamed: Those of them that could be masked, but that the recipe's patterns leave out.
    """

    def __init__(
        self, numel: Callable[[str], int], model: nn.Module, owners: Mapping[str, str], unnamed: Collection[str] = ()
    ) -> None:
        self._numel = numel
        self._in_blocks = sum(numel(name) for name in block_parameters(model))
        self._tables = tables_in_blocks(model)
        self._unnamed = sorted(unnamed)
        self._reasons = {
            name: f"a parameter of {owner}, not a linear layer" for name, owner in owners.items() if name not in unnamed
        }

    def add(self, reasons: Mapping[str, str]) -> None:
        """Add parameters, each with the reason why it cannot be masked."""
        self._reasons.update(reasons)

    def check(self, untracked: Literal["error", "dense"]) -> None:
        """Raise BadInput if there are any and the recipe does not allow them."""
        if self._reasons and untracked == "error":
            raise BadInput(
                "method.untracked: the outputs of some trainable matrices in the blocks cannot be measured, so that "
                f"they would be trained without a mask: {self._listed()}; allowed are untracked: dense, which does "
                "that, LoRA, or another model"
            )

    def message(self) -> str | None:
        """A sentence for the log that lists what is trained without a mask, or None."""
        parts = []
        if self._reasons:
            parts.append(f"untracked matrices in the blocks: {self._listed()}")
        if self._unnamed:
            names = listed(_families(dict.fromkeys(self._unnamed, "")), SHOWN)
            parts.append(f"layers that method.layers leaves out: {names} ({self._share(self._unnamed)})")
        if self._tables:
            names = ", ".join(_families(dict.fromkeys(self._tables, "")))
            parts.append(f"embedding tables in the blocks: {names} ({self._share(self._tables)})")
        return f"migu: trained without a mask: {'; '.join(parts)}" if parts else None

    def _listed(self) -> str:
        families = [f"{name} ({reason})" for name, reason in _families(self._reasons).items()]
        return f"{listed(families, SHOWN)}: {self._share(self._reasons)}"

    def _share(self, names: Mapping[str, str] | list[str]) -> str:
        share = sum(self._numel(name) for name in names) / max(1, self._in_blocks)
        return f"{percent(share)} of the trainable parameters in the blocks"


def _families(reasons: Mapping[str, str]) -> dict[str, str]:
    """List a layer that occurs in every block only once."""
    return {any_block(name): reason for name, reason in reasons.items()}
