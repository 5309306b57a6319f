"""A job without its ranks: what a method needs to go through its index arithmetic on planned shards.

`Method.rehearse` gets a `Rehearsal` in place of an engine: the model on the meta device, and the pieces of every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn

    from cl_dist.config.schema import TrainConfig
    from cl_dist.sharding.maps import Piece, ShardMap

TryOut = Callable[[Callable[["Mapping[str, torch.Tensor]"], None]], "str | None"]


@dataclass(frozen=True)
class Rehearsal:
    """A planned job."""

    model: nn.Module
    """On the meta device, with its adapters."""
    train: TrainConfig
    shapes: Mapping[str, tuple[int, ...]]
    """Whole shapes of the trainable parameters, in model order."""
    shards: ShardMap
    """The pieces of all ranks."""
    try_out: TryOut
    """Runs the trial batches through the model on the meta device and calls its argument with the token masks of each
    before it (`Method.before_trial`). Returns why the model cannot do that on the meta device, or None."""
    _pieces: dict[str, list[Piece]] = field(default_factory=dict)

    def pieces(self, name: str) -> list[Piece]:
        """All ranks' pieces of a trainable parameter, in rank order."""
        if not self._pieces:
            self._pieces.update({each: [] for each in self.shapes})
            for _, owned in self.ranks():
                for each, piece in owned.items():
                    self._pieces[each].append(piece)
        return self._pieces[name]

    def ranks(self) -> Iterator[tuple[int, dict[str, Piece]]]:
        """Each rank, and what it owns by parameter name; one rank at stage 0, where all own the same."""
        for rank in range(1 if self.shards.stage == 0 else self.shards.ranks):
            yield rank, self.shards.owned(rank)


@dataclass(frozen=True)
class Rehearsed:
    """What a method found."""

    notes: tuple[str, ...] = ()
    """Sentences about what was checked, and what could not be."""
    problems: tuple[str, ...] = ()
    """Sentences about what would not work."""

    def __add__(self, other: Rehearsed) -> Rehearsed:
        """Both together."""
        return Rehearsed(self.notes + other.notes, self.problems + other.problems)
