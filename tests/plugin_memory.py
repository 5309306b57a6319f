"""Tests whose plugins are called alike, in one process."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cl_dist.config import plugins
from cl_dist.methods import catalogue
from cl_dist.tasks.formats import catalogue as formats


@contextmanager
def plugins_forgotten() -> Iterator[None]:
    """Afterwards, nothing that was imported within is known any more."""
    path, modules = list(sys.path), set(sys.modules)
    memories: list[dict[str, Any]] = [plugins._loaded, catalogue._used, formats._found]
    before = [dict(memory) for memory in memories]
    try:
        yield
    finally:
        sys.path[:] = path
        own = {name.partition(".")[0] for name in plugins._loaded}
        for name in set(sys.modules) - modules:
            if name.partition(".")[0] in own:
                del sys.modules[name]
        for memory, old in zip(memories, before, strict=True):
            memory.clear()
            memory.update(old)
