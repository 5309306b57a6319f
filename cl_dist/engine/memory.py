"""How much memory the ranks have used."""

from __future__ import annotations

import resource

import torch

from cl_dist.engine.distributed import device


def peak_memory_per_rank() -> list[int]:
    """Return each rank's peak in bytes: allocated on the GPU, or resident in RAM without one (collective)."""
    own = torch.tensor(_peak_memory(), device=device())
    everyone = [torch.zeros_like(own) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(everyone, own)
    return [int(value) for value in everyone]


def _peak_memory() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
