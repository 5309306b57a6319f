"""Pydantic's errors about a recipe as sentences for its author: the key, the value, what is allowed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from pydantic import ValidationError

from cl_dist.config.fields import Setting, allowed_for, settings_of
from cl_dist.config.formats import EXPLAINED
from cl_dist.config.schema import Recipe
from cl_dist.config.words import did_you_mean, shorten, show
from cl_dist.methods.catalogue import known
from cl_dist.tasks.formats.catalogue import known_formats
from cl_dist.tasks.formats.format import defaults_of

MOST_SHOWN = 10
"""Most problems that one message lists."""
OWN_SETTINGS = ("reader", "shared")
"""Fields of `TaskConfig` and `StreamConfig` that hold the formats' settings."""
LONGEST = 750
"""Most characters of one problem's line: enough for the names of all settings of a component."""


def describe_problems(error: ValidationError, methods: Sequence[Any] = (None,)) -> list[str]:
    """One sentence per wrong setting, in the order of the recipe.

    methods: the `name` of each entry in the recipe's `method`, of any type since it is unchecked.
    """
    sentences: dict[str, str] = {}
    for problem in error.errors(include_url=False):
        parts, known_parts = _key_parts(problem["loc"], methods)
        key = ".".join(map(shorten, parts))
        if len(methods) == 1:  # a single method may be written without a list, and `--set` accepts it without an index
            key = key.replace("method.0", "method", 1)
        # If a value fits no member of a union, pydantic reports every member; the first report is enough.
        sentences.setdefault(key, _sentence(key, ".".join(known_parts), dict(problem)))
    # Names and values can be of any length: a long line loses its middle.
    found = [
        "\n".join(
            line if len(line) <= LONGEST else f"{line[: LONGEST * 2 // 3]} ... {line[-LONGEST // 3 :]}"
            for line in sentence.splitlines()
        )
        for sentence in sentences.values()
    ]
    rest = [f"and {len(found) - MOST_SHOWN} more problems"] if len(found) > MOST_SHOWN else []
    return found[:MOST_SHOWN] + rest


def _settings() -> dict[str, Setting]:
    """All settings by key, without list marks."""
    return _settings_with(tuple(known()))


@cache
def _settings_with(methods: tuple[str, ...]) -> dict[str, Setting]:
    """As `_settings`; the argument is there for the cache, since a plugin adds methods, and with them settings."""
    return {setting.key.replace("[]", ""): setting for setting in settings_of(Recipe)}


def _key_parts(loc: Sequence[int | str], methods: Sequence[Any]) -> tuple[list[str], list[str]]:
    """Translate a location from pydantic into the parts of two keys: the one to show, and the one in `_settings`."""
    shown: list[str] = []
    place: list[str] = []
    for part in loc:
        if part in OWN_SETTINGS and place[:1] == ["stream"]:  # recipes write these settings one level higher
            continue
        if isinstance(part, int):
            shown.append(str(part))
            name = methods[part] if place == ["method"] and part < len(methods) else None
            place = [f"method({name})"] if isinstance(name, str) and name in known() else place
        elif "[" in part or _is_plain(".".join(place)):  # pydantic's name for a member of a union
            break
        else:
            shown.append(part)
            place.append(part)
    return shown, place


def _is_plain(key: str) -> bool:
    """Whether a key belongs to a plain value, which contains no other settings."""
    setting = _settings().get(key)
    return setting is not None and setting.component is None and key != "method"


def _sentence(key: str, place: str, problem: Mapping[str, Any]) -> str:
    """One problem as `key: what is wrong; what is allowed`; `place` is the key in `_settings`."""
    kind = "value_error" if problem["type"] == "assertion_error" else problem["type"]  # a plugin's `assert`
    if not problem["loc"] and kind != "value_error":  # about the recipe as a whole
        return f"recipe: {problem['msg']}"
    match kind:
        case "value_error":  # raised by a component's __post_init__, whose message starts with the field's name
            return f"{key}.{problem['ctx']['error']}" if key else str(problem["ctx"]["error"])
        case _ if problem["type"] == EXPLAINED:
            return f"{key}: {problem['msg']}"
        case "unexpected_keyword_argument":
            return f"{key}: unknown key{_similar_keys(place)}"
        case "missing":
            setting = _settings()[place]
            return f"{key}: missing; give {setting.allowed}: {setting.help}"
        case _ if place == "method":  # an entry of the list without the name of a known method
            return _method_sentence(key, problem["input"])
        case "dataclass_type" | "dict_type":
            return f"{key}: {show(problem['input'])} is not a mapping of settings"
    value = problem["input"]
    return f"{key}: {show(value)} is not allowed; allowed: {allowed_for(_settings()[place].allowed, value)}"


def _method_sentence(key: str, entry: Any) -> str:
    allowed = f"allowed: {', '.join(known())}"
    if not isinstance(entry, Mapping):
        return f"{key}: {show(entry)} is not a mapping of settings; write it as {{name: ...}}, {allowed}"
    if "name" not in entry:
        return f"{key}.name: missing; {allowed}"
    name = entry["name"]
    return f"{key}.name: {show(name)} is not a method; {allowed}{did_you_mean(str(name), known())}"


def _similar_keys(place: str) -> str:
    """A hint at what an unknown key may have meant, or all keys that exist in its place."""
    parent, _, name = place.rpartition(".")
    # The likeliest slip is a typo in a neighbour's name.
    neighbours = [setting.name for key, setting in _settings().items() if key.rpartition(".")[0] == parent]
    if parent == "stream.tasks":  # the user's own formats have settings here too
        neighbours = list(
            dict.fromkeys([*neighbours, *(key for _, cls in known_formats() for key in defaults_of(cls))])
        )
    if suggestion := did_you_mean(name, neighbours):
        return suggestion
    # The next likeliest is the right name in the wrong section, or one that belongs to other methods.
    elsewhere = [setting.key for setting in _settings().values() if setting.name == name]
    methods = [found[1] for key in elsewhere if (found := re.fullmatch(r"method\((.+)\)\..+", key))]
    if methods and len(methods) == len(elsewhere):
        return f"; it is a setting of {', '.join(methods)}"
    return f"; did you mean {elsewhere[0]}?" if elsewhere else f"; known here: {', '.join(neighbours)}"
