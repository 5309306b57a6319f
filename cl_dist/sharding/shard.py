"""What a rank holds of a parameter: a flat piece and where it starts."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Shard:
    """Elements `[start, start + data.numel())` of a flattened parameter (or of its gradient or one of its moments)."""

    start: int
    data: torch.Tensor
    """`(numel,)`: a view of the live tensor, so that writing into it changes the training state."""

    @property
    def stop(self) -> int:
        """One past the last element."""
        return self.start + self.data.numel()
