"""Finds formats by name: built-in ones, those of installed packages, and the user's own, `module:Class`."""

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
"""Formats that are not built in and that a recipe has named in this process."""


@cache
def builtin_formats() -> dict[str, type[Format]]:
    """The formats of this package, by name: every class in its modules that sets `name`.

    They are found rather than listed, because a list could miss a new one.
    """
    found: dict[str, type[Format]] = {}
    for entry in pkgutil.iter_modules(formats.__path__, f"{formats.__name__}."):
        for value in vars(import_module(entry.name)).values():
            own = isinstance(value, type) and value.__module__ == entry.name
            if own and issubclass(value, Format) and "name" in vars(value):
                found[value.name] = value
    return found


def format_names() -> list[str]:
    """Names of the formats that need no `module:` in a recipe."""
    return list(dict.fromkeys([*builtin_formats(), *offered(GROUP)]))


def find_format(name: str, setting: str) -> type[Format] | None:
    """The format with this name in a recipe's `setting`; None if there is none.

    Raises PluginError if the module, or the class of an installed package, cannot be used.
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
    """Name and class of the built-in formats, and of those that a recipe has named in this process."""
    yield from builtin_formats().items()
    yield from _found.items()
