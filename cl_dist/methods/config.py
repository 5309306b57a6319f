"""What all methods' settings have in common, and what the rest of the product may ask of any of them.

A method's own `config.py` answers these questions; nothing else knows a method by name. Nothing here imports torch: a
recipe is checked before any framework is loaded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from enum import Enum, auto
from itertools import combinations
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypeVar, cast

from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from typing_extensions import dataclass_transform

from cl_dist.config.ranges import STRICT, is_default
from cl_dist.config.words import show

if TYPE_CHECKING:
    from cl_dist.config.schema import Recipe

Config = TypeVar("Config", bound="VariedConfig")
Class = TypeVar("Class")


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(Field, dataclasses.field))
def settings(cls: type[Class]) -> type[Class]:
    """Decorate a class of settings: a frozen dataclass, checked strictly, whose fields' docstrings are their help."""
    return cast("type[Class]", dataclass(cls, frozen=True, kw_only=True, config=STRICT))


class Role(Enum):
    """What a method does that other methods may not go together with."""

    PLAIN = auto()
    """Nothing: it goes together with everything."""
    FUSES = auto()
    """Fuses the weights before a task with those after it."""
    GROWS = auto()
    """Trains new adapters in every task."""
    ANCHORS = auto()
    """Holds back weights that past tasks have trained."""
    REHEARSES = auto()
    """Mixes past samples into a task's own."""
    BOUND = auto()
    """A bound of the field's tables: no task has a past."""
    SINGLE = auto()
    """Trains every task by itself: what forward transfer is measured against."""


@dataclasses.dataclass(frozen=True)
class Exclusion:
    """Why a method does not go together with others."""

    role: Role | None
    """The others: those with this role; None: all but those that do nothing (`Role.PLAIN`)."""
    why: str

    def covers(self, other: type[MethodConfig]) -> bool:
        """Whether `other` is excluded."""
        return self.role in other.ROLES if self.role is not None else Role.PLAIN not in other.ROLES


@settings
class MethodConfig:
    """Settings of a method. One of your own derives from this and overrides what does not hold for it."""

    METHOD: ClassVar[str] = ""
    """`module:Class` of a built-in method, which is imported when it is built."""
    ROLES: ClassVar[Collection[Role]] = ()
    """What it does that others may exclude."""
    EXCLUDES: ClassVar[Sequence[Exclusion]] = ()
    """What it does not go together with; the first that fits is reported."""
    MEANINGLESS: ClassVar[Sequence[str]] = ()
    """Metrics (keys of metrics.json) that say nothing about it: `cl-dist compare` leaves them out."""
    TABLE_NOTE: ClassVar[str | None] = None
    """What readers of a table of `cl-dist compare` must know about its rows, behind the row's name."""

    name: str
    """Name of the method."""

    def check(self, recipe: Recipe) -> None:
        """Raise ValueError, `setting: what is wrong; what is allowed`, where the recipe does not fit the method."""

    def depends_on_split(self, accumulates: bool) -> str | None:
        """A setting, `name: value`, with which results depend on how the global batch is split into micro-batches.

        accumulates: one of the splits in question has several micro-batches a step. None: there is no such setting.
        """
        return None

    @property
    def adds_samples(self) -> bool:
        """Whether a task's steps learn samples of other tasks too (`Method.training_data`)."""
        return Role.REHEARSES in self.ROLES

    def extra_steps(self, steps: int) -> int:
        """Most steps that the schedule counts beyond a task's own `steps` (`Method.memory`)."""
        return 0

    @classmethod
    def unread(cls, values: Mapping[str, Any]) -> Iterable[str]:
        """Names of settings that nothing reads together with these values, which are not checked yet."""
        return ()


@settings
class VariedConfig(MethodConfig):
    """A method some of whose settings may differ from task to task."""

    VARIED: ClassVar[tuple[str, ...]] = ()
    """Settings that `by_task` may give: those that are read anew in every step or fusion."""

    name: str
    """Name of the method."""
    by_task: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Settings that differ in some tasks, by the task's name, such as {copa: {lambda2: 0.1}}; everything else is as it
    stands beside this."""

    def __post_init__(self) -> None:
        """Refuse values that a setting would not take by itself, or together with the others."""
        for task, values in self.by_task.items():
            for name, value in values.items():
                _check_value(type(self), f"by_task.{task}.{name}", name, value)
            try:
                self.for_task(task)
            except ValidationError as error:
                raise ValueError(f"by_task.{task}.{error.errors()[0]['ctx']['error']}") from None

    def for_task(self: Config, task: str) -> Config:
        """The settings as they are in a task."""
        values = self.by_task.get(task)
        return dataclasses.replace(self, by_task={}, **values) if values else self


def exclusion(one: type[MethodConfig], other: type[MethodConfig]) -> str | None:
    """Why two methods do not go together, whichever comes first; None: they do. A method does not exclude itself."""
    found = [
        entry
        for first, second in ((one, other), (other, one))
        for entry in first.EXCLUDES
        if one is not other and entry.covers(second)
    ]
    # A reason that is about the two methods says more than one that is about a method and all others.
    return min(found, key=lambda entry: entry.role is None).why if found else None


def check_methods(recipe: Recipe) -> None:
    """Raise ValueError where a recipe's methods do not go together, or do not fit the recipe."""
    methods = recipe.method
    names = [method.name for method in methods]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f'method: "{twice}" is given twice; a method composes with others, not with itself')
    if not names:
        raise ValueError("method: the list is empty; for plain fine-tuning give the method sequential")
    for one, other in combinations(methods, 2):
        why = exclusion(type(one), type(other))
        if why is not None:
            raise ValueError(f"method: {one.name} and {other.name} do not compose: {why}")
    for method in methods:
        method.check(recipe)
    _refuse_unknown_tasks(methods, [task.name for task in recipe.stream.tasks])


def refuse_given(config: object, why: str, *names: str) -> None:
    """Raise ValueError, `name: value <why>`, for the first of the settings that differs from its default."""
    for name in names:
        if not is_default(config, name):
            raise ValueError(f"{name}: {str(getattr(config, name)).lower()} {why}")


def refuse_carried_moments(config: MethodConfig, recipe: Recipe) -> None:
    """Raise ValueError where AdamW's moments are carried into tasks that start with other weights."""
    if recipe.train.keep_optimizer:
        raise ValueError(
            f"train.keep_optimizer: true carries AdamW's moments into the next task, whose weights start anew with "
            f"{config.name}; allowed: false"
        )


def _refuse_unknown_tasks(methods: Sequence[MethodConfig], tasks: Sequence[str]) -> None:
    """Raise ValueError for the first name in a `by_task` that is none of the stream's tasks, where these are known."""
    for number, method in enumerate(methods):
        unknown = [task for task in getattr(method, "by_task", ()) if tasks and task not in tasks]
        if unknown:
            place = f"method.{number}" if len(methods) > 1 else "method"
            raise ValueError(
                f'{place}.by_task: "{unknown[0]}" is no task of the stream; its tasks are {", ".join(tasks)}'
            )


def _check_value(cls: type[VariedConfig], place: str, name: str, value: Any) -> None:
    """Raise ValueError unless `by_task` may give the setting `name` this value."""
    from cl_dist.config.fields import describe, info_of  # which themselves read the methods' settings

    info = info_of(cls).get(name)
    if info is None or name not in cls.VARIED:
        reason = "unknown key" if info is None else "is the same in all tasks of a run"
        raise ValueError(f"{place}: {reason}; by_task may give {', '.join(cls.VARIED)}")
    annotated: Any = Annotated
    parts = (info.annotation, *info.metadata)
    kind: Any = annotated[parts] if info.metadata else info.annotation
    try:
        TypeAdapter(kind, config={"allow_inf_nan": False}).validate_python(value, strict=True)
    except ValidationError:
        raise ValueError(
            f"{place}: {show(value)} is not allowed; allowed: {describe(info.annotation, info.metadata)}"
        ) from None
