"""Separates the settings that all tasks have from those of their formats.

A recipe writes both in one mapping. Validation separates them: a format's own settings of a task go into an instance of
its class, `TaskConfig.reader`, and its settings for the whole stream into `StreamConfig.shared`. Serialisation joins
them again.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ArgsKwargs, InitErrorDetails, PydanticCustomError

from cl_dist.config.plugins import PluginError
from cl_dist.config.words import did_you_mean, listed, show
from cl_dist.tasks.formats.catalogue import builtin_formats, find_format, format_names, known_formats
from cl_dist.tasks.formats.format import Format, OwnSettings, StreamSettings, defaults_of

Own = TypeVar("Own", bound=OwnSettings)

EXPLAINED = "explained"
"""Type of pydantic errors whose message only lacks the setting's key (which `config.problems` adds)."""


def allowed_names() -> str:
    """The values that `format` may have, in words."""
    return f"{', '.join(format_names())}, or module:Class for your own"


def summaries() -> str:
    """The built-in formats and what each is for, in words."""
    return f"{'; '.join(f'`{name}`: {cls.summary}' for name, cls in builtin_formats().items())}."


def check_format(name: str, setting: str) -> str:
    """Return `name` if a format has it. Raises pydantic's error otherwise, which says what is allowed."""
    if find_format(name, setting) is None:
        similar = did_you_mean(name, format_names())
        raise _explained(f"{show(name)} is not allowed; allowed: {allowed_names()}{similar}")
    return name


def part(data: Any, cls: type, own: str) -> Any:
    """The input of component `cls` with every setting that is not one of its fields moved into a mapping under `own`.

    `data` is a mapping, or the arguments of a call. Anything else is returned unchanged, for validation to refuse.
    """
    given = data.kwargs if isinstance(data, ArgsKwargs) else data
    if not isinstance(given, Mapping) or (isinstance(data, ArgsKwargs) and data.args):
        return data
    names = {field.name for field in dataclasses.fields(cls)}
    # From here on pydantic validates Python objects, even if the recipe came from JSON, and then strictly refuses a
    # list for a tuple.
    common = {key: tuple(value) if isinstance(value, list) else value for key, value in (given or {}).items()}
    rest = {key: common.pop(key) for key in list(common) if key not in names}
    if rest or own not in common:
        common[own] = {key: given[key] for key in rest}
    return ArgsKwargs((), common) if isinstance(data, ArgsKwargs) else common


def make_reader(name: str, given: Any, common: type, *, strict: bool) -> Format:
    """The format `name` with the settings of one task.

    Args:
        name: A known format.
        given: The settings, or an instance of the format.
        common: The class of the settings that all tasks have.
        strict: Whether the settings come from JSON and are checked as strictly.

    Raises ValueError, or pydantic's ValidationError, for settings that the format does not have.
    """
    cls = find_format(name, "stream.tasks[].format")
    assert cls is not None
    if isinstance(given, Format):
        return given if type(given) is cls else cls()
    _refuse_clash(name, cls, common)
    others = [(other, known) for other, known in known_formats() if known is not cls]
    own, unknown = _sorted_out(given, [cls], others, [name])
    return _built(cls, own, unknown, strict=strict)


def make_shared(
    classes: Mapping[str, type[Format]], given: Any, common: type, *, strict: bool
) -> tuple[StreamSettings, ...]:
    """The stream settings of the formats in `classes`, by name. Other arguments and errors are as in `make_reader`."""
    used = {name: cls.STREAM for name, cls in classes.items() if cls.STREAM is not None}
    if not isinstance(given, Mapping):
        kept = {type(each): each for each in given}
        return tuple(kept.get(cls) or cls() for cls in dict.fromkeys(used.values()))
    for name, cls in used.items():
        _refuse_clash(name, cls, common)
    others = [
        (name, known.STREAM)
        for name, known in known_formats()
        if known.STREAM is not None and known.STREAM not in used.values()
    ]
    own, unknown = _sorted_out(given, list(used.values()), others, sorted(classes))
    found = [
        _built(cls, {key: value for key, value in own.items() if key in defaults_of(cls)}, {}, strict=strict)
        for cls in dict.fromkeys(used.values())
    ]
    _refuse(None, unknown)
    return tuple(found)


def side_by_side(common: Mapping[str, Any], own: Sequence[OwnSettings], *, in_stream: bool) -> dict[str, Any]:
    """The settings of a task, or of a stream (`in_stream`), as JSON types: the common ones and the formats' own."""
    # config.yaml has always contained the settings of all built-in formats; unused ones have their defaults.
    builtin = (cls.STREAM or StreamSettings if in_stream else cls for cls in builtin_formats().values())
    found = {key: value for cls in builtin for key, value in defaults_of(cls).items()}
    for settings in own:
        found |= TypeAdapter(type(settings)).dump_python(settings, mode="json")
    return {**common, **found}


def describe_unread(config: Any, formats: Mapping[str, type[Format]]) -> str | None:
    """A sentence about the first setting in `config`, a StreamConfig, that none of its `formats` reads.

    Settings with their default value do not count. None: there is no such setting.
    """
    everything = {**dict(known_formats()), **formats}
    for field in dataclasses.fields(config):
        users = [name for name, cls in everything.items() if field.name in cls.USES]
        value = getattr(config, field.name)
        if users and value != field.default and not set(users) & set(formats):
            return _read_by_others(field.name, value, users, sorted(formats))
    return None


def format_inputs() -> set[str]:
    """Keys of the formats' settings that only say where and how data is read, so that a resumed run may change them."""
    keys = set()
    for _, cls in known_formats():
        for prefix, owner in (("stream.tasks[].", cls), ("stream.", cls.STREAM or StreamSettings)):
            keys |= {f"{prefix}{name}" for name in defaults_of(owner) if name not in owner.FIXED}
    return keys


def _sorted_out(
    given: Mapping[str, Any],
    used: Sequence[type[OwnSettings]],
    others: Sequence[tuple[str, type[OwnSettings]]],
    formats: Sequence[str],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Sort the `given` settings into those of the classes `used`, and those that no class has.

    Args:
        given: Settings by name.
        used: The settings classes in use.
        others: The classes of other formats, with the formats' names.
        formats: Names of the formats in use, for messages.

    Raises ValueError for a setting of another format.
    """
    own, unknown = {}, {}
    for key, value in given.items():
        owners = [(name, cls) for name, cls in others if key in defaults_of(cls)]
        if any(key in defaults_of(cls) for cls in used):
            own[key] = value
        elif not owners:
            unknown[key] = value
        # A default value is dropped: config.yaml has the settings of all built-in formats, used or not.
        elif value != defaults_of(owners[0][1])[key]:
            cls = owners[0][1]
            if issubclass(cls, StreamSettings):  # its own check may give a better reason
                _built(cls, {key: value}, {}, strict=False).check(formats)
            raise ValueError(_read_by_others(key, value, [name for name, _ in owners], formats))
    return own, unknown


def _read_by_others(key: str, value: Any, owners: Sequence[str], formats: Sequence[str]) -> str:
    readers = f"format{'s' if len(owners) > 1 else ''} {listed(owners, last='and')}"
    return f"{key}: {show(value)} is read by {readers} only, not by {listed(formats, last='and')}"


def _refuse_clash(name: str, cls: type[OwnSettings], common: type) -> None:
    clash = set(defaults_of(cls)) & {field.name for field in dataclasses.fields(common)}
    if clash:
        raise PluginError(f"format {name}: {min(clash)} is a setting of every format; rename the format's own setting")


def _built(cls: type[Own], own: Mapping[str, Any], unknown: Mapping[str, Any], *, strict: bool) -> Own:
    """An instance of `cls`. The error names every wrong and every unknown setting at once."""
    try:
        adapter = TypeAdapter(cls)
        # Strict validation needs JSON here for the same reason as in `load`.
        made = adapter.validate_json(json.dumps(own), strict=True) if strict else adapter.validate_python(dict(own))
    except ValidationError as error:
        _refuse(cls, unknown, error)
        raise
    _refuse(cls, unknown)
    return made


def _refuse(cls: type[OwnSettings] | None, unknown: Mapping[str, Any], error: ValidationError | None = None) -> None:
    """Raise all problems, if there are any, as one error of pydantic that `config.problems` can put into sentences."""
    problems = [
        InitErrorDetails(type="unexpected_keyword_argument", loc=(key,), input=value) for key, value in unknown.items()
    ]
    for problem in error.errors(include_url=False) if error is not None else ():
        assert cls is not None
        if not problem["loc"]:  # raised by `__post_init__`, whose sentence is complete
            reason = str(problem.get("ctx", {}).get("error", problem["msg"]))
            custom = PydanticCustomError("value_error", "{error}", {"error": reason})
            problems.append(InitErrorDetails(type=custom, loc=(), input=problem["input"]))
            continue
        key = str(problem["loc"][0])
        sentence = _sentence(cls, key, problem["type"], problem["input"])
        problems.append(InitErrorDetails(type=_explained(sentence), loc=(key,), input=problem["input"]))
    if problems:
        raise ValidationError.from_exception_data("format", problems)


def _explained(sentence: str) -> PydanticCustomError:
    return PydanticCustomError(EXPLAINED, "{sentence}", {"sentence": sentence})


def _sentence(cls: type[OwnSettings], key: str, kind: str, value: Any) -> str:
    from cl_dist.config.fields import allowed_for, describe, info_of  # imported late, because it imports the schema

    info = info_of(cls)[key]
    allowed = allowed_for(describe(info.annotation, info.metadata), value)
    return f"missing; give {allowed}" if kind == "missing" else f"{show(value)} is not allowed; allowed: {allowed}"
