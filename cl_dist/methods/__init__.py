"""Continual-learning methods: the protocol, a folder for each method, and everything that a method of your own needs.

Names are imported on first use, because reading a recipe needs the methods' settings but not torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cl_dist.methods.config import Exclusion as Exclusion
    from cl_dist.methods.config import MethodConfig as MethodConfig
    from cl_dist.methods.config import Need as Need
    from cl_dist.methods.config import Role as Role
    from cl_dist.methods.config import VariedConfig as VariedConfig
    from cl_dist.methods.config import settings as settings
    from cl_dist.methods.protocol import Memory as Memory
    from cl_dist.methods.protocol import Method as Method
    from cl_dist.methods.protocol import Probe as Probe
    from cl_dist.methods.protocol import TaskPlace as TaskPlace
    from cl_dist.sharding import Shard as Shard
    from cl_dist.sharding import ShardView as ShardView
    from cl_dist.tasks.collate import Batch as Batch
    from cl_dist.tasks.types import Encoded as Encoded

_HOMES = {
    "cl_dist.methods.config": ("Exclusion", "MethodConfig", "Need", "Role", "VariedConfig", "settings"),
    "cl_dist.methods.protocol": ("Memory", "Method", "Probe", "TaskPlace"),
    "cl_dist.sharding": ("Shard", "ShardView"),
    "cl_dist.tasks.collate": ("Batch",),
    "cl_dist.tasks.types": ("Encoded",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    """Import a name from the module that defines it."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
