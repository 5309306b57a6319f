"""The tasks of a recipe: settings that all tasks have, and those that belong to their formats.

A recipe writes both in one mapping. Validation separates them: a format's own settings of a task go into an instance of
its class, `TaskConfig.reader`, and its settings for the whole stream into `StreamConfig.shared`. Serialisation joins
them again. `cl_dist.config.schema` is where the rest of the project imports the two classes from.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic.dataclasses import dataclass
from pydantic_core import ArgsKwargs, InitErrorDetails, PydanticCustomError

from cl_dist.config.plugins import PluginError, check_signatures
from cl_dist.config.ranges import STRICT, Choices, PositiveInt
from cl_dist.config.words import did_you_mean, listed, show
from cl_dist.tasks.formats.catalogue import builtin_formats, find_format, format_names, known_formats
from cl_dist.tasks.formats.format import INFERRED, Format, OwnSettings, StreamSettings, defaults_of

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
    found = find_format(name, setting)
    if found is None:
        similar = did_you_mean(name, format_names())
        raise _explained(f"{show(name)} is not allowed; allowed: {allowed_names()}{similar}")
    if name not in builtin_formats():
        _check_own_format(found, f"{setting}: {name}")
    return name


def _check_own_format(found: type[Format], place: str) -> None:
    """Raise PluginError for settings or class attributes of the user's own format that cannot be used."""
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
        check_signatures(stream, StreamSettings, f"{place}: {stream.__name__}")


TASK_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*")
"""A task's name becomes a folder of the run. Without separators and leading dots, it cannot leave the run folder."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TaskConfig:
    """One task of the stream."""

    name: Annotated[str, Field(min_length=1, max_length=100)]
    """Name of the task, made of letters, digits, `-`, `_` and `.`. It names a folder of the run and, in the benchmark
    formats, the task's files."""
    format: Annotated[str, Choices(allowed_names, summaries)] = "auto"
    """How the data is stored."""
    path: str | None = None
    """Folder or file of the data. A relative path is looked up below `stream.root`, then below the recipe's folder. For
    format `auto` a file's ending may be left out, and `owner/name` is a data set of the Hugging Face Hub. Generated
    data has no path."""
    labels: tuple[str, ...] | None = None
    """The allowed answers (classification). If absent, they are read from labels.json in formats that have one;
    otherwise they are the distinct answers of the training split if there are few of them (`stream.max_labels`). With
    `[]` the task has no labels: the model generates text."""
    epochs: PositiveInt | None = None
    """Passes over this task's training samples; null: train.epochs."""
    reader: Format = Field(default=Format(), exclude=True, kw_only=True)
    """The format with its own settings for this task; a recipe writes them next to the common ones."""

    # In a recipe, common settings and the format's own share one mapping. Validation separates them (`_part`, then
    # `_make_reader`), serialisation joins them again; see cl_dist.config.formats.

    @model_validator(mode="before")
    @classmethod
    def _part(cls, data: Any) -> Any:
        return part(data, TaskConfig, "reader")

    @field_validator("format")
    @classmethod
    def _check_format(cls, name: str) -> str:
        return check_format(name, "stream.tasks[].format")

    @field_validator("reader", mode="plain")
    @classmethod
    def _make_reader(cls, given: Any, info: ValidationInfo) -> Format:
        name = info.data.get("format")
        return Format() if name is None else make_reader(name, given, TaskConfig, strict=info.mode == "json")

    @model_serializer(mode="wrap")
    def _side_by_side(self, common: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return side_by_side(common(self), [self.reader], in_stream=False)

    def __post_init__(self) -> None:
        """Refuse unsafe names, and a path that nothing reads."""
        if not TASK_NAME.fullmatch(self.name):
            raise ValueError(
                f'name: "{self.name}" cannot name a folder; allowed: letters, digits, "-", "_" and ".", no leading "."'
            )
        if not self.reader.HAS_PATH and self.path is not None:
            raise ValueError(f'path: "{self.path}" is not read: format {self.format} generates its data')


@dataclass(frozen=True, kw_only=True, config=STRICT)
class StreamConfig:
    """The tasks, in the order in which the model learns them."""

    tasks: tuple[TaskConfig, ...] = ()
    """The tasks in order. Leave it out if you give `order`."""
    order: int | str | None = None
    """Instead of `tasks`: a published order (`1` to `6`, `superni-1`, `superni-2`, `sgd-1` to `sgd-6`) or an order
    folder of CL_Benchmark. All of its tasks are looked up in `root` and have the format `format`."""
    format: Annotated[str, Choices(allowed_names)] = "tasl"
    """Format of the tasks that `order` names."""
    epochs_by_task: dict[str, PositiveInt] = Field(default_factory=dict)
    """Epochs for individual tasks of `order`, such as {mnli: 2}; all others use train.epochs. With `tasks`, give
    tasks[].epochs instead."""
    root: str | None = None
    """Folder that relative paths of tasks start from."""
    max_train_samples: PositiveInt | None = None
    """Use only the first N training samples of each task."""
    max_eval_samples: PositiveInt | None = None
    """Use only the first N evaluation samples of each task. For dialogues, the last turn is always completed."""
    eval_split: Literal["test", "dev"] = "test"
    """Split to evaluate on. If a task lacks it, the other one is used, and the log reports that."""
    max_labels: PositiveInt = 50
    """A task without stated labels counts as classification if its training answers have at most N distinct values,
    no more than the square root of the number of answers, and each value occurs at least twice."""
    empty_answers: Literal["error", "keep", "skip"] = "error"
    """What to do with a record whose answer is empty. `error` names it and ends the run; `keep` trains on it, so that
    the model learns to answer nothing (as in the public code of TaSL and KIF); `skip` leaves it out, and the log says
    how many were skipped."""
    shared: tuple[StreamSettings, ...] = Field(default=(), exclude=True, kw_only=True)
    """Settings that a format of the stream has for all of its tasks; a recipe writes them next to the ones above."""

    @model_validator(mode="before")
    @classmethod
    def _part(cls, data: Any) -> Any:
        return part(data, StreamConfig, "shared")

    @field_validator("format")
    @classmethod
    def _check_format(cls, name: str) -> str:
        return check_format(name, "stream.format")

    @field_validator("shared", mode="plain")
    @classmethod
    def _make_shared(cls, given: Any, info: ValidationInfo) -> tuple[StreamSettings, ...]:
        if not {"tasks", "format"} <= set(info.data):
            return ()
        classes = _formats(info.data["tasks"], info.data["format"])
        return make_shared(classes, given, StreamConfig, strict=info.mode == "json")

    @model_serializer(mode="wrap")
    def _side_by_side(self, common: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return side_by_side(common(self), self.shared, in_stream=True)

    @property
    def formats(self) -> dict[str, type[Format]]:
        """The formats of the tasks, by name."""
        return _formats(self.tasks, self.format)

    def __post_init__(self) -> None:
        """Refuse a stream without tasks, and two tasks with one name, which identifies their files and results."""
        if bool(self.tasks) == (self.order is not None):
            problem = "both are given" if self.tasks else "neither is given"
            raise ValueError(f"tasks: a stream has either tasks or an order; {problem}")
        if self.tasks and self.epochs_by_task:
            raise ValueError("epochs_by_task: is for the tasks that an order names; give tasks[].epochs instead")
        names = [task.name for task in self.tasks]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f'tasks: the name "{twice}" is given twice; give every task a different name')
        formats = self.formats
        if self.format != type(self).format and self.format not in formats:
            raise ValueError(f"format: {self.format} is for the tasks that an order names; give tasks[].format instead")
        for settings in self.shared:
            settings.check(formats)
        unread = describe_unread(self, formats)
        if unread is not None:
            raise ValueError(unread)


def _formats(tasks: Sequence[TaskConfig], order_format: str) -> dict[str, type[Format]]:
    """The formats of a stream's tasks by name; without listed tasks, the format of the order's tasks."""
    if tasks:
        return {task.format: type(task.reader) for task in tasks}
    found = find_format(order_format, "stream.format")
    return {} if found is None else {order_format: found}


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
