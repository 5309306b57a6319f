"""Distributed continual learning for language models: MIGU and KIF on DeepSpeed ZeRO shards.

The names in `_NAMES` are the Python API (docs/python.md). Each is imported when it is first used, so that
`import cl_dist` imports no framework.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # for type checkers and editors
    from cl_dist.api.loaded_run import LoadedRun as LoadedRun
    from cl_dist.api.loaded_run import load_run as load_run
    from cl_dist.api.running import run as run
    from cl_dist.config.schema import Recipe as Recipe
    from cl_dist.integrate.trainer import ContinualCallback as ContinualCallback
    from cl_dist.integrate.trainer import continual as continual
    from cl_dist.sharding.shards import Shards as Shards
    from cl_dist.sharding.shards import shards as shards

__version__ = "0.1.0"

_NAMES = {
    "ContinualCallback": "cl_dist.integrate.trainer",
    "LoadedRun": "cl_dist.api.loaded_run",
    "Recipe": "cl_dist.config.schema",
    "Shards": "cl_dist.sharding.shards",
    "continual": "cl_dist.integrate.trainer",
    "load_run": "cl_dist.api.loaded_run",
    "run": "cl_dist.api.running",
    "shards": "cl_dist.sharding.shards",
}
"""The module of each public name."""


def __getattr__(name: str) -> object:
    """Import a public name on first use."""
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_NAMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_NAMES])
