"""The only place that knows how DeepSpeed shards: gradient, master weight and moments as rank-local flat views."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from cl_dist.sharding.check import DEEPSPEED_VERSION, check_deepspeed

if TYPE_CHECKING:
    from cl_dist.sharding.compact import CompactExchange
    from cl_dist.sharding.inner_step import ElementFilter, RowFreezer, SteppedGradients
    from cl_dist.sharding.layouts import Shard
    from cl_dist.sharding.model import (
        gather_state_dict,
        gathered,
        release_before_forward,
        remove_leftovers,
        replica_checksums,
        sharded_bytes,
        whole_parameters,
    )
    from cl_dist.sharding.view import ShardView, TorchState

__all__ = [
    "DEEPSPEED_VERSION",
    "CompactExchange",
    "ElementFilter",
    "RowFreezer",
    "Shard",
    "ShardView",
    "SteppedGradients",
    "TorchState",
    "check_deepspeed",
    "gather_state_dict",
    "gathered",
    "release_before_forward",
    "remove_leftovers",
    "replica_checksums",
    "sharded_bytes",
    "whole_parameters",
]

_HOMES = {
    "gather_state_dict": "model",
    "gathered": "model",
    "sharded_bytes": "model",
    "release_before_forward": "model",
    "remove_leftovers": "model",
    "replica_checksums": "model",
    "whole_parameters": "model",
    "CompactExchange": "compact",
    "ElementFilter": "inner_step",
    "RowFreezer": "inner_step",
    "Shard": "layouts",
    "ShardView": "view",
    "SteppedGradients": "inner_step",
    "TorchState": "view",
}


def __getattr__(name: str) -> object:
    """Import what needs torch on first use: `cl-dist doctor` calls `check_deepspeed` alone, which must stay cheap."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"cl_dist.sharding.{_HOMES[name]}"), name)
