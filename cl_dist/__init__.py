"""Distributed continual learning for language models: MIGU and KIF on DeepSpeed ZeRO shards."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "ContinualCallback": "cl_dist.integrate",
    "continual": "cl_dist.integrate",
}
"""What scripts import from here, and where it is: imported on first use, because that takes torch and transformers."""


def __getattr__(name: str) -> Any:
    """Import a name from the module that defines it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
