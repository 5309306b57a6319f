"""The only place that knows how DeepSpeed shards: gradient, master weight and moments as rank-local flat views."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cl_dist.sharding.check import DEEPSPEED_VERSION, check_deepspeed

if TYPE_CHECKING:
    from cl_dist.sharding.freeze import RowFreezer
    from cl_dist.sharding.gather import gather_state_dict, whole_parameters
    from cl_dist.sharding.leftovers import remove_leftovers
    from cl_dist.sharding.replicas import replica_checksums
    from cl_dist.sharding.shard import Shard
    from cl_dist.sharding.stepped import SteppedGradients
    from cl_dist.sharding.view import ShardView

__all__ = [
    "DEEPSPEED_VERSION",
    "RowFreezer",
    "Shard",
    "ShardView",
    "SteppedGradients",
    "check_deepspeed",
    "gather_state_dict",
    "remove_leftovers",
    "replica_checksums",
    "whole_parameters",
]


def __getattr__(name: str) -> object:
    """Import what needs torch only when it is asked for: `check_deepspeed` alone must stay cheap."""
    from importlib import import_module

    homes = {
        "gather_state_dict": "gather",
        "remove_leftovers": "leftovers",
        "replica_checksums": "replicas",
        "whole_parameters": "gather",
        "RowFreezer": "freeze",
        "Shard": "shard",
        "ShardView": "view",
        "SteppedGradients": "stepped",
    }
    if name not in homes:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"cl_dist.sharding.{homes[name]}"), name)
