"""`--set a.b.c=value`: changes made to a recipe before it is checked."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
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
_NAMED = {"method": "method.name", "model": "model.name_or_path"}
"""Components that `as_overrides` takes by name, and the settings that the name is for."""


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
        """Sort key: methods first, then their names, then the rest. So `--set method.name` may come after the method's
        settings.
        """
        if self.path == ("method",):
            return 0
        return 1 if self.changes_method else 2

    @property
    def changes_method(self) -> bool:
        """Whether this is `method.name` or `method.N.name`."""
        return self.path[0] == "method" and self.path[-1] == "name" and len(self.path) <= 3


def as_overrides(changes: Mapping[str, Any]) -> list[str]:
    """Changes that are written in Python, as texts for `parse_override`.

    `{"train": {"epochs": 2}}` and `{"train.epochs": 2}` become `train.epochs=2`. A method or a model may be given by
    its name alone; a mapping in place of a method is the whole method. Raises BadInput for a value that YAML cannot
    express.
    """
    return [f"{key}={_written(key, value)}" for key, value in _leaves(changes)]


def _leaves(changes: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in changes.items():
        key = f"{above}{name}"
        if key in _NAMED and isinstance(value, str):
            yield _NAMED[key], value
        elif isinstance(value, Mapping) and value and key != "method":
            yield from _leaves(value, f"{key}.")
        else:
            yield key, value


def _written(key: str, value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, default=_plain)
    except (TypeError, ValueError) as error:
        raise BadInput(
            f"{key}: {show(value)} cannot be written into a recipe; allowed: texts, numbers, booleans, None, lists and "
            "dictionaries of these"
        ) from error


def _plain(value: Any) -> Any:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(type(value).__name__)


def parse_override(text: str) -> Override:
    """Parse `a.b.c=value`, where the value is YAML. Raises BadInput for any other form."""
    if not is_text(text):
        raise BadInput(f"--set {show(text)}: not UTF-8 text")
    key, equals, value = text.partition("=")
    path = tuple(part.strip() for part in key.split("."))
    if not equals or not all(path):
        raise BadInput(f'--set {shorten(text)}: not of the form key=value; write for example "--set train.epochs=3"')
    if len(path) > MAX_DEPTH or len(key) > MAX_KEY:
        raise BadInput(f"--set {shorten(key)}: no setting is nested that deeply or has such a long name")
    if not value.strip():
        raise BadInput(f'--set {text}: no value; write "{key}=null" for none and "{key}=\'\'" for an empty text')
    return Override(path, parse_yaml(value, f"--set {key}"))


def apply_overrides(recipe: dict[str, Any], overrides: Sequence[Override]) -> None:
    """Change `recipe` in place. If a key is set twice, the later one wins.

    `method` may be a mapping or a list; afterwards it is a list. Changing a method's name drops those settings from the
    recipe that the new method does not have or read, so that `method.name=migu` works on any recipe. Raises BadInput
    for a key that leads into a plain value, or to a list entry that does not exist.
    """
    for override in sorted(overrides, key=lambda override: override.order):
        if override.path[0] == "method" and override.order > 0:
            _normalise_method(recipe)
            override = _indexed(override, recipe["method"])
        before = []
        if override.changes_method:
            before = [method.get("name") for method in recipe["method"] if isinstance(method, dict)]
        _set(recipe, override)
        if override.changes_method:
            method = recipe["method"][int(override.path[1])]
            _drop_foreign_settings(method, renamed=method["name"] not in before)
    _normalise_method(recipe)


def _normalise_method(recipe: dict[str, Any]) -> None:
    """Make `method` a list: without it, of the default method; from a single mapping, of that one."""
    method = recipe.setdefault("method", {"name": DEFAULT})
    if not isinstance(method, list):
        recipe["method"] = [method]


def _indexed(override: Override, methods: Any) -> Override:
    """Turn `method.x` into `method.0.x` if the recipe has one method."""
    if not isinstance(methods, list) or _is_position(override.path[1]):
        return override
    if len(methods) != 1:
        rest = ".".join(override.path[1:])
        raise BadInput(f"--set {override.key}: the recipe has {len(methods)} methods; say which: method.0.{rest}")
    return Override(("method", "0", *override.path[1:]), override.value)


def _is_position(part: str) -> bool:
    """Whether a part of a key is the position of a list entry."""
    return part.isascii() and part.isdecimal() and len(part) <= MAX_POSITION_DIGITS


def _drop_foreign_settings(method: dict[str, Any], renamed: bool) -> None:
    """Drop the settings of `method` that belong to the method whose name it had before.

    renamed: no method of the recipe had this name before, so its settings were chosen for another one.
    """
    cls = config_class(method["name"])
    if cls is None:  # an unknown name, which validation reports
        return
    for key in set(method) - set(info_of(cls)):
        del method[key]

    # `by_task` keeps only what the new method can vary by task.
    tasks = method.get("by_task")
    if isinstance(tasks, dict) and all(isinstance(values, dict) for values in tasks.values()):
        varied = getattr(cls, "VARIED", ())
        kept = {task: {key: value for key, value in values.items() if key in varied} for task, values in tasks.items()}
        tasks = method["by_task"] = {task: values for task, values in kept.items() if values}

    # The new method may have a setting of the same name that it does not read, given its other settings.
    if renamed:
        for settings in (method, *(tasks.values() if isinstance(tasks, dict) else ())):
            if isinstance(settings, dict):
                for name in list(cls.unread({**method, **settings})):
                    settings.pop(name, None)


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
    """The mapping or list that `part` leads to. Creates a mapping if there is nothing or null."""
    if isinstance(place, list):
        inner = place[_index(place, part, override, depth)]
    else:
        if place.get(part) is None:
            place[part] = {}
        inner = place[part]
    if not isinstance(inner, dict | list):
        where = ".".join(override.path[:depth])
        raise BadInput(f"--set {override.key}: {where} is {show(inner)}, which contains no settings")
    return inner


def _index(entries: list[Any], part: str, override: Override, depth: int) -> int:
    if not _is_position(part) or int(part) >= len(entries):
        where = ".".join(override.path[: depth - 1])
        raise BadInput(f'--set {override.key}: {where} has no entry "{part}"; allowed: 0 to {len(entries) - 1}')
    return int(part)
