"""The name, allowed values and meaning of every setting, derived from the dataclasses of `schema`.

Error messages and `cl-dist recipe --explain` use the same description, so they cannot disagree.
"""

from __future__ import annotations

import dataclasses
import json
import textwrap
import types
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from inspect import get_annotations
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import rebuild_dataclass
from pydantic.errors import PydanticUndefinedAnnotation
from pydantic.fields import FieldInfo
from pydantic_core import PydanticSerializationError, PydanticUndefined

from cl_dist.config.plugins import PluginError, loaded_classes
from cl_dist.config.ranges import MOST_FLOAT, MOST_INT, Choices
from cl_dist.config.schema import Recipe, StreamConfig, TaskConfig
from cl_dist.config.words import did_you_mean, listed, shorten, show
from cl_dist.errors import BadInput
from cl_dist.methods.catalogue import MethodEntry, known
from cl_dist.tasks.formats.catalogue import builtin_formats
from cl_dist.tasks.formats.format import Format, StreamSettings

_WORDS = {int: "a whole number", float: "a number", str: "a string", bool: "true or false", type(None): "null"}
_BOUNDS = {"ge": "at least {}", "gt": "above {}", "le": "at most {}", "lt": "below {}"}
_SIZES = {"min_length": "at least {}", "max_length": "at most {}"}
WIDTH = 100
"""Characters per line of the help."""


def explain(prefix: str = "", columns: int | None = None) -> str:
    """The text of `cl-dist recipe --explain`: settings with their values, defaults and meanings.

    columns: Of the terminal, if the text goes to one.
    prefix: Only those whose key starts with it. Lists need no `[]`, and a method's name may stand for `method(NAME)`.

    Raises BadInput, with similar keys, if there is none.
    """
    settings = list(settings_of(Recipe))
    wanted = prefix.replace("[]", "")
    found = [each for each in settings if any(key.startswith(wanted) for key in each.spellings)]
    if not found:
        named = [each.key for each in settings if each.name == wanted.rpartition(".")[2]]
        similar = f"; did you mean {listed(named, 5, last='or')}?" if named else ""
        similar = similar or did_you_mean(prefix, [key for each in settings for key in each.spellings])
        raise BadInput(f"--explain: no setting starts with {shorten(prefix)}{similar}")
    return "\n\n".join(_paragraph(each, min(WIDTH, columns or WIDTH)) for each in found)


def _paragraph(setting: Setting, width: int) -> str:
    default = f" (default: {setting.default})" if setting.default else ""
    if setting.default is None and setting.key != "output_dir":  # its default follows from the recipe's name
        default = " (must be given)"
    lines = (f"{setting.allowed}{default}", setting.help)
    filled = (textwrap.fill(line, width, initial_indent="    ", subsequent_indent="    ") for line in lines)
    return "\n".join([setting.key, *filled])


def info_of(cls: type) -> dict[str, FieldInfo]:
    """What pydantic knows about a component's fields, by name."""
    fields: dict[str, FieldInfo] = cls.__pydantic_fields__  # type: ignore[attr-defined]
    return fields


def component_of(annotation: Any) -> type | None:
    """The dataclass in a field's annotation, also inside `| None` or a list; None if there is none.

    A method does not count as a component, because its settings depend on its name.
    """
    if annotation == MethodEntry:
        return None
    if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
        return annotation
    found = [component_of(part) for part in get_args(annotation)]
    components = [component for component in found if component is not None]
    return components[0] if len(components) == 1 else None


def describe(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """The values that an annotation allows, in words: `a whole number, at least 1, or null`.

    Limits far beyond any sensible value (`ranges.MOST_INT`, `MOST_FLOAT`) are left out.
    """
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *extra = get_args(annotation)
        return describe(inner, _flatten(extra))
    if origin in (Union, types.UnionType):
        return ", or ".join(describe(part) for part in get_args(annotation))
    if origin is Literal:
        return ", ".join(str(value) for value in get_args(annotation))
    choices = next((limit for limit in metadata if isinstance(limit, Choices)), None)
    if choices is not None:
        return choices.describe()
    return ", ".join([_describe_plain(annotation), *_describe_limits(annotation, metadata)])


def allowed_for(allowed: str, value: Any) -> str:
    """The text of `describe`, plus a hint at what the author of this `value` may have missed."""
    if isinstance(value, int | float) and abs(value) > MOST_INT:
        allowed += f" (and never above {MOST_INT if 'whole' in allowed else MOST_FLOAT})"
    unquoted = "a string" in allowed or "a list of strings" in allowed
    if unquoted and isinstance(value, bool | int | float):
        return f"{allowed} (in quotes it is a string)"
    return allowed


def _describe_plain(annotation: Any) -> str:
    if get_origin(annotation) in (tuple, list):
        item = get_args(annotation)[0]
        many = {int: "whole numbers", float: "numbers", str: "strings"}.get(item, "values")
        return "a list of mappings" if component_of(item) or item == MethodEntry else f"a list of {many}"
    if get_origin(annotation) is dict and get_origin(get_args(annotation)[1]) is Annotated:
        return f"a mapping of names, each to {describe(get_args(annotation)[1])}"
    if component_of(annotation) or get_origin(annotation) is dict:
        return "a mapping of settings"
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return ", ".join(str(member.value) for member in annotation)
    # An annotation that is not in the table comes from a plugin's settings.
    return _WORDS.get(annotation) or f"a value of type {getattr(annotation, '__name__', annotation)}"


def _describe_limits(annotation: Any, metadata: Sequence[Any]) -> Iterator[str]:
    one, several = ("entry", "entries") if get_origin(annotation) is tuple else ("character", "characters")
    for limit in metadata:  # annotated-types objects such as Ge(ge=1)
        for name, words in _BOUNDS.items():
            if hasattr(limit, name) and getattr(limit, name) not in (MOST_INT, MOST_FLOAT):
                value = getattr(limit, name)
                yield words.format(int(value) if value == int(value) else f"{value:g}")
        for name, words in _SIZES.items():
            if hasattr(limit, name):
                size = getattr(limit, name)
                yield f"{words.format(size)} {one if size == 1 else several}"


def _flatten(metadata: Sequence[Any]) -> list[Any]:
    # `Field(ge=1)` in an annotation is a FieldInfo, which holds the actual limits.
    return [limit for entry in metadata for limit in (entry.metadata if isinstance(entry, FieldInfo) else [entry])]


def check_own_settings(cls: type, place: str, reserved: Collection[str]) -> None:
    """Check the settings that the user's own class declares.

    Raises PluginError if a recipe could not hold them: an undefined type, a default that the setting itself would not
    accept, a `reserved` name, or an entry of `PATHS`, `DATA`, `VARIED` or `FIXED` that is not a setting.
    """
    try:
        rebuild_dataclass(cls)
    except PydanticUndefinedAnnotation as error:
        raise PluginError(f"{place}: the types of its settings cannot be read: {error.message}") from error
    fields = info_of(cls)
    own = [name for base in cls.__mro__ if not base.__module__.startswith("cl_dist.") for name in get_annotations(base)]
    for name in own:
        if name in fields and name in reserved:
            raise PluginError(f"{place}: {name} already has a meaning; give the setting another name")
    for attribute in ("PATHS", "DATA", "VARIED", "FIXED"):
        names = getattr(cls, attribute, ())
        if isinstance(names, str) or not set(names) <= set(fields):
            raise PluginError(
                f"{place}: {attribute}: {show(names)} is not allowed; allowed: a tuple of its settings' names"
            )
    for name, info in fields.items():
        default = info.get_default(call_default_factory=True)
        if default is not PydanticUndefined and not _can_be(info, default):
            allowed = describe(info.annotation, info.metadata)
            raise PluginError(f"{place}: {name}: its default, {show(default)}, is not allowed; allowed: {allowed}")
    for name in getattr(cls, "PATHS", ()):
        if not _can_be(fields[name], "a/path"):
            raise PluginError(f"{place}: {name} is listed in PATHS, so it must allow a string (str, or str | None)")


def _can_be(info: FieldInfo, value: Any) -> bool:
    """Whether a setting can be this value, and a recipe can hold it."""
    annotated: Any = Annotated
    parts = (info.annotation, *info.metadata)
    kind: Any = annotated[parts] if info.metadata else info.annotation
    config = None if dataclasses.is_dataclass(info.annotation) else ConfigDict(allow_inf_nan=False)
    adapter: TypeAdapter[Any] = TypeAdapter(kind, config=config)
    try:
        adapter.validate_python(value, strict=True)
        json.dumps(adapter.dump_python(value, mode="json"), allow_nan=False)
    except (ValidationError, PydanticSerializationError, TypeError, ValueError):
        return False
    return True


@dataclass(frozen=True)
class Setting:
    """The description of one setting of a recipe."""

    key: str
    """Dotted key. `[]` marks a list of mappings; `method(NAME).` starts the key of a method's setting."""
    allowed: str
    default: str | None
    """None if the setting must be given; "" for a component, whose settings have their own defaults."""
    help: str
    component: type | None
    """The settings class of a component; None for a plain value."""

    @property
    def name(self) -> str:
        """The last part of the key."""
        return self.key.rpartition(".")[2].removesuffix("[]")

    @property
    def spellings(self) -> tuple[str, ...]:
        """The keys under which it is looked up: `method(migu).mask` is also `method.mask` and `migu.mask`."""
        key = self.key.replace("[]", "")
        method, _, rest = key.removeprefix("method(").partition(")")
        return (key, f"method{rest}", f"{method}{rest}") if rest else (key,)


def settings_of(cls: type, prefix: str = "") -> Iterator[Setting]:
    """All settings of component `cls` and of the components in it, depth first, in the order of the source."""
    for name, info in info_of(cls).items():
        if info.exclude:  # a field that validation fills from other settings
            continue
        setting = _setting(f"{prefix}{name}", info, _help(cls, name))
        yield setting
        if setting.component is not None:
            yield from settings_of(setting.component, f"{setting.key}.")
        elif cls is Recipe and name == "method":
            for method, settings in known().items():
                yield from settings_of(settings, f"method({method}).")
    if cls in (TaskConfig, StreamConfig):
        yield from _of_formats(cls, prefix)


def _of_formats(cls: type, prefix: str) -> Iterator[Setting]:
    """The formats' own settings of a task or of the stream. One that several formats share comes once, naming them."""
    found: dict[str, Setting] = {}
    owners: dict[str, list[str]] = {}
    classes: dict[str, type[Format]] = {**builtin_formats(), **loaded_classes(Format)}
    for name, data_format in classes.items():
        for setting in settings_of(data_format if cls is TaskConfig else data_format.STREAM or StreamSettings, prefix):
            found[setting.key] = setting
            owners.setdefault(setting.key, []).append(name)
    for key, setting in found.items():
        names = owners[key]
        plural = "s" if len(names) > 1 else ""
        yield dataclasses.replace(setting, help=f"Format{plural} {listed(names, last='and')}: {setting.help}")


def _help(cls: type, name: str) -> str | None:
    # Pydantic takes docstrings from the source of the class itself, so an inherited field has its text in a parent.
    fields = (info_of(base).get(name) for base in cls.__mro__ if dataclasses.is_dataclass(base))
    return next((info.description for info in fields if info is not None and info.description), None)


def _setting(key: str, info: FieldInfo, text: str | None) -> Setting:
    component = component_of(info.annotation)
    choices = next((limit for limit in info.metadata if isinstance(limit, Choices)), None)
    if choices is not None and choices.meaning is not None:
        text = f"{text} {choices.meaning()}"
    holds_many = get_origin(info.annotation) is tuple and (component is not None or key == "method")
    return Setting(
        key=f"{key}[]" if holds_many else key,
        allowed=describe(info.annotation, info.metadata),
        default=_default(info),
        help=" ".join((text or (component and component.__doc__) or "").split()),
        component=component,
    )


def _default(info: FieldInfo) -> str | None:
    if info.default_factory is not None:
        return ""
    if info.default is PydanticUndefined:
        return None
    if isinstance(info.default, tuple):  # of strings, or the default method
        return ", ".join(entry if isinstance(entry, str) else entry.name for entry in info.default)
    if component_of(info.annotation) and info.default is not None:
        return ""
    return info.default if isinstance(info.default, str) else json.dumps(info.default, default=str)
