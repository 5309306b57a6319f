"""The base of all methods' settings: what the rest of the product can ask of any method, and which methods compose.

Each method answers in its own `config.py`; no other code refers to a method by name. Nothing here imports torch,
because a recipe is checked before any framework is loaded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from enum import Enum, auto
from itertools import combinations
from math import ceil
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
    """Turn a class of settings into a frozen, strictly checked dataclass. Its fields' docstrings are their help."""
    return cast("type[Class]", dataclass(cls, frozen=True, kw_only=True, config=STRICT))


class Role(Enum):
    """What a method does that other methods may not compose with."""

    PLAIN = auto()
    """Does nothing special: composes with everything."""
    FUSES = auto()
    """Fuses the weights before and after a task."""
    GROWS = auto()
    """Trains new adapters in every task."""
    ANCHORS = auto()
    """Holds back weights that past tasks have trained."""
    SELECTS = auto()
    """Chooses which part of the weights is trained."""
    REHEARSES = auto()
    """Mixes past samples into a task's own."""
    BOUND = auto()
    """Is a bound in the field's tables: no task has a past."""
    SINGLE = auto()
    """Trains every task separately, as the baseline for forward transfer."""


class Need(Enum):
    """What a method needs that not every training script has (`cl_dist.integrate`); the value completes a sentence."""

    START = "has to change the model before its optimiser exists"
    """Allowed where the script builds the optimiser later, as transformers' Trainer does."""
    SAMPLES = "trains on samples of other tasks too, which only `cl-dist run` can mix in"
    PROBE = "measures the model on chosen samples of the stream, which only `cl-dist run` knows"
    REBUILD = "gives every task parameters of its own, for which only `cl-dist run` builds a new engine"


@dataclasses.dataclass(frozen=True)
class Exclusion:
    """Other methods that a method does not compose with, and why."""

    role: Role | None
    """Excludes methods with this role; None: all methods except plain ones (`Role.PLAIN`)."""
    why: str

    def covers(self, other: type[MethodConfig]) -> bool:
        """Whether `other` is excluded."""
        return self.role in other.ROLES if self.role is not None else Role.PLAIN not in other.ROLES


@settings
class MethodConfig:
    """Settings of a method. Derive yours from it, and override the answers that do not hold for your method."""

    METHOD: ClassVar[str] = ""
    """`module:Class` of a built-in method; the module is imported when the method is built."""
    ROLES: ClassVar[Collection[Role]] = ()
    """What the method does that others may exclude."""
    EXCLUDES: ClassVar[Sequence[Exclusion]] = ()
    """What it does not compose with; the first exclusion that applies is reported."""
    MEANINGLESS: ClassVar[Sequence[str]] = ()
    """Metrics (keys of metrics.json) that mean nothing for this method; `cl-dist compare` leaves them out."""
    PATHS: ClassVar[tuple[str, ...]] = ()
    """Settings that are paths; relative ones start from the recipe's folder."""
    DATA: ClassVar[tuple[str, ...]] = ()
    """Paths among them that lead to data sets, which are read like a task's and found in `Probe.data`."""
    NEEDS: ClassVar[Collection[Need]] = ()
    """What the method needs besides the passes and steps of a training script."""
    TABLE_NOTE: ClassVar[str | None] = None
    """What readers of a `cl-dist compare` table must know about its rows; shown after the row's name."""

    name: str
    """Name of the method."""

    def check(self, recipe: Recipe) -> None:
        """Raise ValueError (`setting: what is wrong; what is allowed`) if the recipe does not fit the method."""

    def depends_on_split(self, accumulates: bool) -> str | None:
        """A setting (`name: value`) that makes results depend on how a batch is split into micro-batches, or None.

        Args:
            accumulates: Whether any of the compared splits has several micro-batches per step.
        """
        return None

    @property
    def adds_samples(self) -> bool:
        """Whether a task also trains on samples of other tasks (`Method.training_data`)."""
        return Role.REHEARSES in self.ROLES

    @property
    def needs(self) -> Collection[Need]:
        """`NEEDS`, and samples if the method adds any with these settings."""
        return (*self.NEEDS, Need.SAMPLES) if self.adds_samples else self.NEEDS

    def extra_steps(self, steps: int) -> int:
        """Maximum number of steps that the schedule counts in addition to a task's own `steps` (`Method.memory`)."""
        return 0

    def samples_per_epoch(self, index: int, counts: Sequence[int]) -> int:
        """Samples that task `index` trains on in an epoch, of tasks with these numbers of own ones
        (`Method.training_data`, `Method.trains`). A plan asks; override it if the method adds any.
        """
        return counts[index]

    def memory_steps(self, steps: int) -> int:
        """Steps on past samples in addition to `steps` own ones of a later task (`Method.memory`)."""
        return 0

    @classmethod
    def unread(cls, values: Mapping[str, Any]) -> Iterable[str]:
        """Names of settings that nothing reads if the settings have these (unchecked) values."""
        return ()


@settings
class VariedConfig(MethodConfig):
    """Settings of which some can differ from task to task."""

    VARIED: ClassVar[tuple[str, ...]] = ()
    """Settings that `by_task` can override: those that are read again in every step or fusion."""

    name: str
    """Name of the method."""
    by_task: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Settings that differ in some tasks, by task name, such as {copa: {lambda2: 0.1}}; all others keep the value given
    next to it."""

    def __post_init__(self) -> None:
        """Refuse values that the setting does not allow, by itself or together with the others."""
        for task, values in self.by_task.items():
            for name, value in values.items():
                _check_value(type(self), f"by_task.{task}.{name}", name, value)
            try:
                self.for_task(task)
            except ValidationError as error:
                raise ValueError(f"by_task.{task}.{error.errors()[0]['ctx']['error']}") from None

    def for_task(self: Config, task: str) -> Config:
        """The settings during a task."""
        values = self.by_task.get(task)
        return dataclasses.replace(self, by_task={}, **values) if values else self


def share_of(count: int, ratio: float) -> int:
    """Samples in a memory that keeps this share of a task's: at least one, unless the share is 0."""
    return min(count, ceil(ratio * count)) if ratio > 0 else 0


def exclusion(one: type[MethodConfig], other: type[MethodConfig]) -> str | None:
    """Why two methods do not compose, in either order, or None if they do. A method does not exclude itself."""
    found = [
        entry
        for first, second in ((one, other), (other, one))
        for entry in first.EXCLUDES
        if one is not other and entry.covers(second)
    ]
    # A reason about these two methods says more than one about a method and all others.
    return min(found, key=lambda entry: entry.role is None).why if found else None


def check_methods(recipe: Recipe) -> None:
    """Raise ValueError if a recipe's methods do not compose, or do not fit the recipe."""
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
    """Raise ValueError (`name: value <why>`) for the first of these settings that differs from its default."""
    for name in names:
        if not is_default(config, name):
            raise ValueError(f"{name}: {str(getattr(config, name)).lower()} {why}")


def refuse_carried_moments(config: MethodConfig, recipe: Recipe) -> None:
    """Raise ValueError if AdamW's moments are carried into tasks that start with other weights."""
    if recipe.train.keep_optimizer:
        raise ValueError(
            f"train.keep_optimizer: true carries AdamW's moments into the next task, but with {config.name} that task "
            "starts from other weights; allowed: false"
        )


def _refuse_unknown_tasks(methods: Sequence[MethodConfig], tasks: Sequence[str]) -> None:
    """Raise ValueError for the first name in a `by_task` that is not a task of the stream, if its tasks are known."""
    for number, method in enumerate(methods):
        unknown = [task for task in getattr(method, "by_task", ()) if tasks and task not in tasks]
        if unknown:
            place = f"method.{number}" if len(methods) > 1 else "method"
            raise ValueError(
                f'{place}.by_task: "{unknown[0]}" is not a task of the stream; its tasks are {", ".join(tasks)}'
            )


def _check_value(cls: type[VariedConfig], place: str, name: str, value: Any) -> None:
    """Raise ValueError unless `by_task` can set `name` to this value."""
    from cl_dist.config.fields import describe, info_of  # these modules import the methods' settings

    info = info_of(cls).get(name)
    if info is None or name not in cls.VARIED:
        reason = "unknown key" if info is None else "cannot differ between the tasks of a run"
        raise ValueError(f"{place}: {reason}; by_task can set {', '.join(cls.VARIED)}")
    annotated: Any = Annotated
    parts = (info.annotation, *info.metadata)
    kind: Any = annotated[parts] if info.metadata else info.annotation
    try:
        TypeAdapter(kind, config={"allow_inf_nan": False}).validate_python(value, strict=True)
    except ValidationError:
        raise ValueError(
            f"{place}: {show(value)} is not allowed; allowed: {describe(info.annotation, info.metadata)}"
        ) from None
