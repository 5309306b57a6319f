"""A kind of tracked layer that is not built in, to show what adding one takes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from cl_dist.models.layer_kinds import LayerKind
from cl_dist.models.row_gradients import ChosenRows, row_skipping_linear


class LowRank(nn.Module):
    """`Y = X D W` with a fixed D `(in, rank)` and a trained W `(rank, out)`, stored transposed."""

    is_transposed = True
    down: torch.Tensor

    def __init__(self, inner: int, outer: int, rank: int) -> None:
        super().__init__()
        self.register_buffer("down", torch.randn(inner, rank))
        self.weight = nn.Parameter(torch.randn(rank, outer))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., in) to (..., out)."""
        return hidden @ self.down @ self.weight


class LowRankKind(LayerKind):
    """Everything that MIGU needs to know about the layer."""

    name = "low rank"
    types = (LowRank,)
    columns = True

    def skips(self, module: nn.Module) -> bool:
        return isinstance(module, LowRank)

    def skipping_forward(self, module: nn.Module, chosen: ChosenRows) -> Callable[..., torch.Tensor]:
        def forward(hidden: torch.Tensor) -> torch.Tensor:
            return row_skipping_linear(hidden @ module.down, module.weight.t(), None, chosen)  # type: ignore

        return forward
