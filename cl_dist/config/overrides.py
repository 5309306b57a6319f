"""`--set a.b.c=value`: changes to a recipe before it is checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cl_dist.config.fields import info_of
from cl_dist.config.words import is_text, shorten, show
from cl_dist.config.yaml_text import MAX_DEPTH, parse_yaml
from cl_dist.errors import BadInput
from cl_dist.methods.catalogue import DEFAULT, config_class

MAX_KEY = 500
"""Characters of a dotted key."""
MAX_POSITION_DIGITS = 6


@dataclass(frozen=True)
class Override:
    """One `--set`, parsed."""

    path: tuple[str, ...]
    value: Any

    @property
    def key(self) -> str:
        """The key as typed."""
        return ".".join(self.path)

    @property
    def order(self) -> int:
        """Methods first, then their names, then the rest: so the order of `--set method.name` and its settings is
        free.
        """
        if self.path == ("method",):
            return 0
        return 1 if self.changes_method else 2

    @property
    def changes_method(self) -> bool:
        """Whether this is `method.name` or `method.N.name`."""
        return self.path[0] == "method" and self.path[-1] == "name" and len(self.path) <= 3


def parse_override(text: str) -> Override:
    """`a.b.c=value`, the value in YAML; BadInput where it is not of that form."""
    if not is_text(text):
        raise BadInput(f"--set {show(text)}: not UTF-8 text")
    key, equals, value = text.partition("=")
    path = tuple(part.strip() for part in key.split("."))
    if not equals or not all(path):
        raise BadInput(f'--set {shorten(text)}: not of the form key=value; write for example "--set train.epochs=3"')
    if len(path) > MAX_DEPTH or len(key) > MAX_KEY:
        raise BadInput(f"--set {shorten(key)}: no setting lies that deep, or has so long a name")
    if not value.strip():
        raise BadInput(f'--set {text}: no value; write "{key}=null" for none and "{key}=\'\'" for an empty text')
    return Override(path, parse_yaml(value, f"--set {key}"))


def apply_overrides(recipe: dict[str, Any], overrides: Sequence[Override]) -> None:
    """Change `recipe` in place; where a key is set twice the later one wins.

    `method` may be a mapping or a list and is a list afterwards. Changing a method's name drops the settings that stood
    in the recipe and that the new method does not have or read, so that `method.name=migu` works on any recipe. Raises
    BadInput for a key that leads through something that is neither a mapping nor an entry of a list.
    """
    for override in sorted(overrides, key=lambda override: override.order):
        if override.path[0] == "method" and override.order > 0:
            _normalise_method(recipe)
            override = _indexed(override, recipe["method"])
        before = _method_names(recipe) if override.changes_method else []
        _set(recipe, override)
        if override.changes_method:
            method = recipe["method"][int(override.path[1])]
            _drop_unknown_settings(method)
            if method["name"] not in before:
                _drop_unread_settings(method)
    _normalise_method(recipe)


def _normalise_method(recipe: dict[str, Any]) -> None:
    """`method` as a list: absent means the default one, and one mapping is a list of one."""
    method = recipe.setdefault("method", {"name": DEFAULT})
    if not isinstance(method, list):
        recipe["method"] = [method]


def _method_names(recipe: dict[str, Any]) -> list[Any]:
    """Names of the methods, whatever they are."""
    return [method.get("name") for method in recipe["method"] if isinstance(method, dict)]


def _indexed(override: Override, methods: Any) -> Override:
    """`method.x` as `method.0.x`, where the recipe has one method."""
    if not isinstance(methods, list) or _is_position(override.path[1]):
        return override
    if len(methods) != 1:
        rest = ".".join(override.path[1:])
        raise BadInput(f"--set {override.key}: the recipe has {len(methods)} methods; say which: method.0.{rest}")
    return Override(("method", "0", *override.path[1:]), override.value)


def _is_position(part: str) -> bool:
    """Whether a part of a key counts entries of a list."""
    return part.isascii() and part.isdecimal() and len(part) <= MAX_POSITION_DIGITS


def _drop_unknown_settings(method: dict[str, Any]) -> None:
    cls = config_class(method["name"])
    if cls is not None:
        for key in set(method) - set(info_of(cls)):
            del method[key]
        _drop_from_tasks(method, getattr(cls, "VARIED", ()))


def _drop_unread_settings(method: dict[str, Any]) -> None:
    """Drop what the new method has too and, with its other settings, does not read (kif's `tau` in tasl)."""
    cls = config_class(method["name"])
    tasks = method.get("by_task")
    for settings in (method, *(tasks.values() if isinstance(tasks, dict) else ())):
        if isinstance(settings, dict) and cls is not None:
            for name in list(cls.unread({**method, **settings})):
                settings.pop(name, None)


def _drop_from_tasks(method: dict[str, Any], varied: Sequence[str]) -> None:
    """Let `by_task` keep what the new method takes there."""
    tasks = method.get("by_task")
    if isinstance(tasks, dict) and all(isinstance(values, dict) for values in tasks.values()):
        kept = {task: {key: value for key, value in values.items() if key in varied} for task, values in tasks.items()}
        method["by_task"] = {task: values for task, values in kept.items() if values}


def _set(recipe: dict[str, Any], override: Override) -> None:
    place: Any = recipe
    for depth, part in enumerate(override.path[:-1], start=1):
        place = _enter(place, part, override, depth)
    last = override.path[-1]
    if isinstance(place, list):
        place[_index(place, last, override, len(override.path))] = override.value
    else:
        place[last] = override.value


def _enter(place: Any, part: str, override: Override, depth: int) -> Any:
    """The mapping or list that `part` leads to; an absent (or null) one is made."""
    if isinstance(place, list):
        inner = place[_index(place, part, override, depth)]
    else:
        if place.get(part) is None:
            place[part] = {}
        inner = place[part]
    if not isinstance(inner, dict | list):
        where = ".".join(override.path[:depth])
        raise BadInput(f"--set {override.key}: {where} is {show(inner)}, which has no settings")
    return inner


def _index(entries: list[Any], part: str, override: Override, depth: int) -> int:
    if not _is_position(part) or int(part) >= len(entries):
        where = ".".join(override.path[: depth - 1])
        raise BadInput(f'--set {override.key}: "{part}" is no entry of {where}; allowed: 0 to {len(entries) - 1}')
    return int(part)
