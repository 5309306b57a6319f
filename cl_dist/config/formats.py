"""A recipe's tasks as their formats see them: which settings belong to whom.

In a recipe the settings that all tasks have (`TaskConfig`) and those of a task's format stand side by side. Validation
parts them: the format's own go into an instance of its class, `TaskConfig.reader`, and what a format has in `stream`
goes into `StreamConfig.shared`. Serialisation puts them side by side again.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ArgsKwargs, InitErrorDetails, PydanticCustomError

from cl_dist.config.plugins import PluginError
from cl_dist.config.words import did_you_mean, listed, show
from cl_dist.tasks.formats.catalogue import builtin_formats, find_format, format_names, known_formats
from cl_dist.tasks.formats.format import INFERRED, Format, OwnSettings, StreamSettings, defaults_of

Own = TypeVar("Own", bound=OwnSettings)

EXPLAINED = "explained"
"""Type of pydantic errors whose message is the whole sentence but for the setting's key (`config.problems`)."""


def allowed_names() -> str:
    """What `format` may be, in words."""
    return f"{', '.join(format_names())}, or module:Class for one of your own"


def summaries() -> str:
    """What the built-in formats are, in words."""
    return f"{'; '.join(f'`{name}`: {cls.summary}' for name, cls in builtin_formats().items())}."


def check_format(name: str, setting: str) -> str:
    """`name`, once it is known to be a format's; a pydantic error that says what is allowed otherwise."""
    found = find_format(name, setting)
    if found is None:
        similar = did_you_mean(name, format_names())
        raise _explained(f"{show(name)} is not allowed; allowed: {allowed_names()}{similar}")
    if name not in builtin_formats():
        _check_own_format(found, f"{setting}: {name}")
    return name


def _check_own_format(found: type[Format], place: str) -> None:
    """Raise PluginError for settings of a format of the user's own, or facts about it, that cannot be used."""
    from cl_dist.config.fields import check_own_settings  # which itself reads the schema

    if found.read is Format.read:
        raise PluginError(f"{place}: it has no read(self, source), which returns a RawTask")
    stream: object = found.STREAM
    if stream is not None and not (isinstance(stream, type) and issubclass(stream, StreamSettings)):
        raise PluginError(f"{place}: STREAM is not allowed; allowed: a class that derives from StreamSettings")
    if isinstance(found.USES, str) or not isinstance(found.USES, Collection) or not set(found.USES) <= INFERRED:
        raise PluginError(f"{place}: USES is not allowed; allowed: a set of {', '.join(sorted(INFERRED))}")
    check_own_settings(found, place, {*dir(Format), "name"})
    if stream is not None:
        check_own_settings(stream, f"{place}: {stream.__name__}", dir(StreamSettings))


def part(data: Any, cls: type, own: str) -> Any:
    """What a component `cls` is made from, with all that is none of its own settings put together under the key `own`.

    `data` is a mapping, or what the class was called with; anything else is returned as it is.
    """
    given = data.kwargs if isinstance(data, ArgsKwargs) else data
    if not isinstance(given, Mapping) or (isinstance(data, ArgsKwargs) and data.args):
        return data
    names = {field.name for field in dataclasses.fields(cls)}
    # Python's validation, which strictly takes no list for a tuple, goes on here, also where JSON was read.
    common = {key: tuple(value) if isinstance(value, list) else value for key, value in (given or {}).items()}
    rest = {key: common.pop(key) for key in list(common) if key not in names}
    if rest or own not in common:
        common[own] = {key: given[key] for key in rest}
    return ArgsKwargs((), common) if isinstance(data, ArgsKwargs) else common


def make_reader(name: str, given: Any, common: type, *, strict: bool) -> Format:
    """The format `name` with the settings of one task.

    given: The settings, or an instance of the format. common: The class of the settings that all tasks have. strict:
    They were read from JSON. Raises ValueError, or pydantic's, for settings that it does not take.
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
    """What the formats of a stream's tasks, `classes` by name, have in `stream` (arguments and errors as for
    `make_reader`).
    """
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
    """A task's settings, or (`in_stream`) a stream's, as JSON types: the common ones and the formats' own.

    As in every release, those of built-in formats that are not used are there with their defaults.
    """
    unused = (cls.STREAM or StreamSettings if in_stream else cls for cls in builtin_formats().values())
    found = {key: value for cls in unused for key, value in defaults_of(cls).items()}
    for settings in own:
        found |= TypeAdapter(type(settings)).dump_python(settings, mode="json")
    return {**common, **found}


def describe_unread(config: Any, formats: Mapping[str, type[Format]]) -> str | None:
    """`setting: value has a meaning for ... only` for the first general setting of the stream `config` (a dataclass)
    that differs from its default and that none of the `formats` uses; None where each is used.
    """
    everything = {**dict(known_formats()), **formats}
    for field in dataclasses.fields(config):
        users = [name for name, cls in everything.items() if field.name in cls.USES]
        value = getattr(config, field.name)
        if users and value != field.default and not set(users) & set(formats):
            return _meant_for(field.name, value, users, sorted(formats))
    return None


def format_inputs() -> set[str]:
    """The keys of formats' settings that only say where and how data is read."""
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
    """The settings that one of the classes `used` has, and those that no class has.

    A setting of one of the `others`, which are given with their format's name, is dropped where it has its default: the
    config.yaml of earlier releases spells the settings of all formats out. Raises ValueError for any other value.
    """
    own, unknown = {}, {}
    for key, value in given.items():
        owners = [(name, cls) for name, cls in others if key in defaults_of(cls)]
        if any(key in defaults_of(cls) for cls in used):
            own[key] = value
        elif not owners:
            unknown[key] = value
        elif value != defaults_of(owners[0][1])[key]:
            _refuse_unread(key, value, owners, formats)
    return own, unknown


def _refuse_unread(
    key: str, value: Any, owners: Sequence[tuple[str, type[OwnSettings]]], formats: Sequence[str]
) -> None:
    """Raise ValueError for a setting of other formats than the ones that are used."""
    cls = owners[0][1]
    if issubclass(cls, StreamSettings):  # it may know a better reason
        _built(cls, {key: value}, {}, strict=False).check(formats)
    raise ValueError(_meant_for(key, value, [name for name, _ in owners], formats))


def _meant_for(key: str, value: Any, owners: Sequence[str], formats: Sequence[str]) -> str:
    readers = f"format{'s' if len(owners) > 1 else ''} {listed(owners, last='and')}"
    return f"{key}: {show(value)} has a meaning for {readers} only, not {listed(formats, last='and')}"


def _refuse_clash(name: str, cls: type[OwnSettings], common: type) -> None:
    clash = set(defaults_of(cls)) & {field.name for field in dataclasses.fields(common)}
    if clash:
        raise PluginError(f"format {name}: every format has a setting {min(clash)}; give its own another name")


def _built(cls: type[Own], own: Mapping[str, Any], unknown: Mapping[str, Any], *, strict: bool) -> Own:
    """An instance; every setting that it does not take is reported at once."""
    try:
        adapter = TypeAdapter(cls)
        # Through JSON, for the reason that `load` has.
        made = adapter.validate_json(json.dumps(own), strict=True) if strict else adapter.validate_python(dict(own))
    except ValidationError as error:
        _refuse(cls, unknown, error)
        raise
    _refuse(cls, unknown)
    return made


def _refuse(cls: type[OwnSettings] | None, unknown: Mapping[str, Any], error: ValidationError | None = None) -> None:
    """Raise pydantic's error, if there is anything to raise, in a form that `config.problems` has sentences for."""
    problems = [
        InitErrorDetails(type="unexpected_keyword_argument", loc=(key,), input=value) for key, value in unknown.items()
    ]
    for problem in error.errors(include_url=False) if error is not None else ():
        assert cls is not None
        if not problem["loc"]:  # a sentence of its `__post_init__`
            problems.append(InitErrorDetails(type=_as_custom(problem), loc=(), input=problem["input"]))
            continue
        key = str(problem["loc"][0])
        sentence = _sentence(cls, key, problem["type"], problem["input"])
        problems.append(InitErrorDetails(type=_explained(sentence), loc=(key,), input=problem["input"]))
    if problems:
        raise ValidationError.from_exception_data("format", problems)


def _as_custom(problem: Mapping[str, Any]) -> PydanticCustomError:
    reason = str(problem.get("ctx", {}).get("error", problem["msg"]))
    return PydanticCustomError("value_error", "{error}", {"error": reason})


def _explained(sentence: str) -> PydanticCustomError:
    return PydanticCustomError(EXPLAINED, "{sentence}", {"sentence": sentence})


def _sentence(cls: type[OwnSettings], key: str, kind: str, value: Any) -> str:
    from cl_dist.config.fields import allowed_for, describe, info_of  # which themselves read the schema

    info = info_of(cls)[key]
    allowed = allowed_for(describe(info.annotation, info.metadata), value)
    return f"missing; give {allowed}" if kind == "missing" else f"{show(value)} is not allowed; allowed: {allowed}"
