"""What pydantic found wrong with a recipe, told to its author: the key, the value, what is allowed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from pydantic import ValidationError

from cl_dist.config.fields import Setting, allowed_for, method_classes, settings_of
from cl_dist.config.formats import EXPLAINED
from cl_dist.config.schema import Recipe
from cl_dist.config.words import did_you_mean, shorten, show
from cl_dist.tasks.formats.catalogue import known_formats
from cl_dist.tasks.formats.format import defaults_of

MOST_SHOWN = 10
"""Most problems that one message lists."""
OWN_SETTINGS = ("reader", "shared")
"""Fields of `TaskConfig` and `StreamConfig` with the settings of formats."""
LONGEST = 750
"""Characters of one problem's line; the names of a component's settings fit."""


def describe_problems(error: ValidationError, methods: int = 1) -> list[str]:
    """One sentence per setting that is wrong, in the order of the recipe, which has so many `methods`."""
    sentences: dict[str, str] = {}
    for problem in error.errors(include_url=False):
        key = ".".join(map(shorten, _key_parts(problem["loc"])[0]))
        if methods == 1:  # its author may have written a mapping, and may leave the index out in any case
            key = key.replace("method.0", "method", 1)
        # A value that fits no member of a union is reported once per member; the first report says it all.
        sentences.setdefault(key, _sentence(key, dict(problem)))
    found = ["\n".join(map(_clip, sentence.splitlines())) for sentence in sentences.values()]
    rest = [f"and {len(found) - MOST_SHOWN} more problems"] if len(found) > MOST_SHOWN else []
    return found[:MOST_SHOWN] + rest


def _clip(line: str) -> str:
    """A line without its middle where names or values of any length have made it endless."""
    return line if len(line) <= LONGEST else f"{line[: LONGEST * 2 // 3]} ... {line[-LONGEST // 3 :]}"


@cache
def _settings() -> dict[str, Setting]:
    """All settings by their key without list marks."""
    return {setting.key.replace("[]", ""): setting for setting in settings_of(Recipe)}


def _key_parts(loc: Sequence[int | str]) -> tuple[list[str], list[str]]:
    """A place in pydantic's words as the parts of the key to show and of the key in `_settings`."""
    shown: list[str] = []
    known: list[str] = []
    for part in loc:
        if part in OWN_SETTINGS and known[:1] == ["stream"]:  # which stand beside the common ones
            continue
        if isinstance(part, int):
            shown.append(str(part))
        elif known == ["method"] and part in method_classes():  # pydantic's tag of the method
            known = [f"method({part})"]
        elif "[" in part or _is_plain(".".join(known)):  # pydantic's name for a member of a union
            break
        else:
            shown.append(part)
            known.append(part)
    return shown, known


def _is_plain(key: str) -> bool:
    """Whether a key is that of a plain value, below which there is no other setting."""
    setting = _settings().get(key)
    return setting is not None and setting.component is None and key != "method"


def _sentence(key: str, problem: Mapping[str, Any]) -> str:
    """One problem as `key: what is wrong; what is allowed`."""
    known = ".".join(_key_parts(problem["loc"])[1])
    if not problem["loc"] and problem["type"] != "value_error":  # about the recipe as a whole
        return f"recipe: {problem['msg']}"
    match problem["type"]:
        case "value_error":  # raised by a component's __post_init__, whose message starts with the field's name
            return f"{key}.{problem['ctx']['error']}" if key else str(problem["ctx"]["error"])
        case _ if problem["type"] == EXPLAINED:
            return f"{key}: {problem['msg']}"
        case "unexpected_keyword_argument":
            return f"{key}: unknown key{_similar_keys(known)}"
        case "missing":
            setting = _settings()[known]
            return f"{key}: missing; give {setting.allowed}: {setting.help}"
        case _ if known == "method":  # an entry of the list: which method it is could not be told
            return _method_sentence(key, problem["input"])
        case "dataclass_type" | "dict_type":
            return f"{key}: {show(problem['input'])} is not a mapping of settings"
    value = problem["input"]
    return f"{key}: {show(value)} is not allowed; allowed: {allowed_for(_settings()[known].allowed, value)}"


def _method_sentence(key: str, entry: Any) -> str:
    allowed = f"allowed: {', '.join(method_classes())}"
    if not isinstance(entry, Mapping):
        return f"{key}: {show(entry)} is not a mapping of settings; write it as {{name: ...}}, {allowed}"
    if "name" not in entry:
        return f"{key}.name: missing; {allowed}"
    name = entry["name"]
    return f"{key}.name: {show(name)} is not a method; {allowed}{did_you_mean(str(name), method_classes())}"


def _similar_keys(known: str) -> str:
    """What the unknown key may have meant: one of its neighbours, the same name elsewhere, or else all neighbours."""
    parent, _, name = known.rpartition(".")
    neighbours = [setting.name for key, setting in _settings().items() if key.rpartition(".")[0] == parent]
    if parent == "stream.tasks":  # formats of the user's own have settings there too
        neighbours = list(
            dict.fromkeys([*neighbours, *(key for _, cls in known_formats() for key in defaults_of(cls))])
        )
    if suggestion := did_you_mean(name, neighbours):
        return suggestion
    elsewhere = [setting.key for setting in _settings().values() if setting.name == name]
    return f"; did you mean {elsewhere[0]}?" if elsewhere else f"; known here: {', '.join(neighbours)}"
