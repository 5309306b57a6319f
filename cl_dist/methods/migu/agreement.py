"""A check that costs no collective of its own: did all ranks choose the same rows in the last step?

Each rank appends two numbers to a sum all-reduce that happens anyway: a fingerprint h of its masks and h squared. By
the Cauchy-Schwarz inequality n * sum(h^2) = (sum h)^2 exactly when all n fingerprints are equal; fingerprints are
integers small enough for double precision to be exact. A disagreement is thus seen one step later.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable

import torch

from cl_dist.errors import ClDistError

_MODULUS = 1 << 20  # h < 2^20, h^2 < 2^40: exact sums for up to 2^13 ranks


class Agreement:
    """Fingerprint of the last step's masks.

    Args:
        device: Where the all-reduced vector lives.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._fingerprint = 0

    def remember(self, masks: Iterable[torch.Tensor]) -> None:
        """Take the fingerprint of this step's masks (bool tensors, in the same order on all ranks)."""
        joined = torch.cat([mask.reshape(-1) for mask in masks]).cpu().numpy()
        self._fingerprint = zlib.crc32(joined.tobytes()) % _MODULUS

    def message(self) -> torch.Tensor:
        """`(2,)` float64: what goes into the sum all-reduce."""
        return torch.tensor([self._fingerprint, self._fingerprint**2], dtype=torch.float64, device=self._device)

    def check(self, summed: torch.Tensor) -> None:
        """Compare the summed messages of all ranks.

        Raises:
            ClDistError: The ranks did not choose the same rows; the run's weights can't be trusted.
        """
        total, squares = (int(value) for value in summed.tolist())
        if torch.distributed.get_world_size() * squares != total**2:
            raise ClDistError(
                f"rank {torch.distributed.get_rank()}: the ranks chose different rows in the last step (their masks' "
                "fingerprints differ); the weights have diverged, resume from the last saved state"
            )
