"""`by_task`: settings of a method that are others in some tasks of the stream."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from cl_dist.config.ranges import STRICT
from cl_dist.config.words import show

Config = TypeVar("Config", bound="VariedConfig")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class VariedConfig:
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
                _check(type(self), f"by_task.{task}.{name}", name, value)
            try:
                self.for_task(task)
            except ValidationError as error:
                raise ValueError(f"by_task.{task}.{error.errors()[0]['ctx']['error']}") from None

    def for_task(self: Config, task: str) -> Config:
        """The settings as they are in a task."""
        values = self.by_task.get(task)
        return dataclasses.replace(self, by_task={}, **values) if values else self


def unknown_task(methods: Sequence[object], tasks: Iterable[str]) -> str | None:
    """What is wrong with the names in the methods' `by_task`: the first that is none of `tasks`."""
    names = list(tasks)
    for number, method in enumerate(methods):
        for task in method.by_task if isinstance(method, VariedConfig) else ():
            if task not in names:
                place = f"method.{number}" if len(methods) > 1 else "method"
                return f'{place}.by_task: "{task}" is no task of the stream; its tasks are {", ".join(names)}'
    return None


def _check(cls: type[VariedConfig], place: str, name: str, value: Any) -> None:
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
