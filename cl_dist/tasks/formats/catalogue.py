"""Which formats there are: built-in ones, those that installed packages offer, and a recipe's own, `module:Class`."""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator
from functools import cache
from importlib import import_module

from cl_dist.config.plugins import load_class, load_offered, names_class, offered
from cl_dist.tasks import formats
from cl_dist.tasks.formats.format import Format

GROUP = "cl_dist.formats"
"""Entry-point group in which installed packages offer formats."""

_found: dict[str, type[Format]] = {}
"""Formats from elsewhere that recipes of this process have named."""


@cache
def builtin_formats() -> dict[str, type[Format]]:
    """The formats of this package, by name: every class in one of its modules that gives itself a name.

    There is no list of them that a new one could be missing from.
    """
    found: dict[str, type[Format]] = {}
    for entry in pkgutil.iter_modules(formats.__path__, f"{formats.__name__}."):
        for value in vars(import_module(entry.name)).values():
            if isinstance(value, type) and issubclass(value, Format) and "name" in vars(value):
                found[value.name] = value
    return found


def format_names() -> list[str]:
    """Names that a recipe may give without a module."""
    return list(dict.fromkeys([*builtin_formats(), *offered(GROUP)]))


def find_format(name: str, setting: str) -> type[Format] | None:
    """The format that a recipe calls `name` in a `setting`; None where there is none of that name.

    Raises PluginError where the module, or what an installed package offers, cannot be used.
    """
    builtin = builtin_formats()
    if name in _found:
        return _found[name]
    if names_class(name):
        _found[name] = load_class(name, Format, "format", setting)
    elif name not in builtin and name in offered(GROUP):
        _found[name] = load_offered(offered(GROUP)[name], Format, "format", setting, builtin)
    return builtin.get(name) or _found.get(name)


def known_formats() -> Iterator[tuple[str, type[Format]]]:
    """Name and class of the built-in formats, and of the others that recipes of this process have named."""
    yield from builtin_formats().items()
    yield from _found.items()
