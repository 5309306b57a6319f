"""Do all ranks still compute with the same weights? Asked every so many steps (`train.check_replicas_every`)."""

from __future__ import annotations

import torch

from cl_dist.config.words import listed
from cl_dist.errors import JobFailed
from cl_dist.sharding import replica_checksums

_SHOWN_RANKS = 8


def check_replicas(model: torch.nn.Module, where: str) -> int:
    """Compare what every rank holds whole (collective); return how many parameters that are.

    Args:
        model: The module inside the engine, between two steps.
        where: Step and task, for the message.

    Raises:
        JobFailed: A parameter is not the same everywhere; on all ranks, naming the first one and the ranks.
    """
    names, sums = replica_checksums(model)
    if torch.distributed.get_world_size() == 1 or not names:
        return len(names)
    lowest, highest = sums.clone(), sums.clone()
    torch.distributed.all_reduce(lowest, torch.distributed.ReduceOp.MIN)
    torch.distributed.all_reduce(highest, torch.distributed.ReduceOp.MAX)
    differing = (lowest != highest).nonzero()[:, 0].tolist()
    if differing:
        raise JobFailed(_describe(names, sums, differing, where))
    return len(names)


def _describe(names: list[str], sums: torch.Tensor, differing: list[int], where: str) -> str:
    """Which ranks hold what (collective)."""
    everyone = [torch.zeros_like(sums) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(everyone, sums)
    holders: dict[int, list[int]] = {}
    for rank, theirs in enumerate(everyone):
        holders.setdefault(int(theirs[differing[0]]), []).append(rank)
    groups = " and ".join(_named(ranks) for ranks in sorted(holders.values(), key=len, reverse=True))
    more = f" (and {len(differing) - 1} more parameters)" if len(differing) > 1 else ""
    return (
        f"{where}: the ranks no longer hold the same weights: {names[differing[0]]}{more} differs between {groups}; "
        "a broken device or driver is likely, resume from the last saved state without it"
    )


def _named(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {listed(ranks, _SHOWN_RANKS)}"
