"""What a data format is: a class that describes how data is stored, holds its own settings, and reads a task."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import Field
from pydantic.dataclasses import dataclass as checked_dataclass
from typing_extensions import dataclass_transform

from cl_dist.config.files import expand, is_there
from cl_dist.config.ranges import STRICT
from cl_dist.errors import BadInput
from cl_dist.tasks.types import Example, Kind, ScoredOn

SPLITS: dict[str, ScoredOn] = {
    "test": "test",
    **dict.fromkeys(("dev", "eval", "validation", "valid", "val"), "dev"),
}
"""What formats call the splits that are evaluated on."""
DEV_NAMES = tuple(name for name, split in SPLITS.items() if split == "dev")

EmptyAnswers = Literal["error", "keep", "skip"]

FILES = frozenset({"root", "eval_split"})
ANSWERS = FILES | {"empty_answers"}
INFERRED = ANSWERS | {"max_labels"}
"""General settings of the stream that a format may use (`Format.USES`): for data in files, with answers, whose labels
may have to be inferred from the answers.
"""

Own = TypeVar("Own", bound="OwnSettings")


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(Field,))
class OwnSettings:
    """Settings that belong to one format. The fields of a subclass are its settings: annotated, with a default and a
    docstring underneath, which is the help text.

    Subclasses become frozen dataclasses with strictly checked fields; no decorator is needed. `__post_init__` may raise
    ValueError with a sentence that starts with the name of a setting.
    """

    PATHS: ClassVar[tuple[str, ...]] = ()
    """Settings that hold a path, which is looked up like a task's own."""
    FIXED: ClassVar[tuple[str, ...]] = ()
    """Settings that a resumed run may not change. The others only say where and how the data is read, and a digest of
    the samples says whether they are the same."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        checked_dataclass(frozen=True, kw_only=True, config=STRICT)(cls)


class StreamSettings(OwnSettings):
    """Settings of one format that stand in `stream` and hold for all of its tasks (`Format.STREAM`)."""

    def check(self, formats: Collection[str]) -> None:
        """Raise ValueError where a setting does not go with the `formats` of the stream's tasks."""


def defaults_of(cls: type[OwnSettings]) -> dict[str, Any]:
    """The names of a format's settings and their defaults (`dataclasses.MISSING` where a setting must be given)."""
    return {field.name: field.default for field in dataclasses.fields(cls)}  # type: ignore[arg-type]


def paths_of(settings: OwnSettings) -> dict[str, str]:
    """The paths that a format's settings give, by setting."""
    return {name: path for name in settings.PATHS if (path := getattr(settings, name)) is not None}


def with_paths(settings: Own, paths: Mapping[str, str | None]) -> Own:
    """A format's settings with other paths."""
    return dataclasses.replace(settings, **paths) if paths else settings  # type: ignore[type-var]


class Format(OwnSettings):
    """A way to store data. The fields of a subclass are settings of a task (`stream.tasks[]`), beside the common ones;
    an instance is a format with the settings of one task.
    """

    name: ClassVar[str]
    """What recipes call it."""
    summary: ClassVar[str] = ""
    """A few words for the help text."""
    USES: ClassVar[frozenset[str]] = INFERRED
    """Which of the stream's general settings have a meaning for it: root, eval_split, empty_answers, max_labels."""
    STREAM: ClassVar[type[StreamSettings] | None] = None
    """Settings of its own in `stream`."""
    HAS_PATH: ClassVar[bool] = True
    """Whether its data lies at a path; otherwise it is generated."""
    METRIC: ClassVar[str | None] = None
    """The score that `eval.metric: auto` means for its tasks; None: it follows from the kind of task."""

    @property
    def only_documents(self) -> bool:
        """Whether a task certainly consists of plain text, without prompts and answers."""
        return False

    def read(self, source: Source) -> RawTask:
        """Read a task. Raises BadInput where its data is missing or broken; the caller adds the task's name."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a task's data is, and the settings of the stream that say how it is read."""

    name: str
    """Name of the task."""
    format: str
    """Name of its format, as the recipe has it."""
    recipe_dir: Path
    path_in_recipe: str | None = None
    """`path` of the task."""
    labels: tuple[str, ...] | None = None
    """`labels` of the task."""
    root: str | None = None
    eval_split: Literal["test", "dev"] = "test"
    empty_answers: EmptyAnswers = "error"
    max_train_samples: int | None = None
    max_eval_samples: int | None = None
    stream_settings: tuple[StreamSettings, ...] = ()

    def path(self) -> Path:
        """The task's folder or file; `stream.root` itself where the task names none.

        Raises BadInput where the recipe names neither.
        """
        if self.path_in_recipe is not None:
            return self.resolve(self.path_in_recipe)
        if self.root is None:
            raise BadInput(f"format {self.format!r} needs a path: set `path` of the task or `stream.root`")
        return self._root()

    def resolve(self, written: str) -> Path:
        """A path of the recipe as one to open: below `stream.root`, else below the recipe's folder, unless absolute."""
        path = expand(written, "path")
        below_root, beside_recipe = self._root() / path, self.recipe_dir / path
        return beside_recipe if is_there(beside_recipe) and not is_there(below_root) else below_root

    def _root(self) -> Path:
        """`stream.root`, itself relative to the recipe's folder; that folder where there is no root."""
        return self.recipe_dir / expand(self.root or "", "stream.root")

    def settings(self, cls: type[Own]) -> Own:
        """A format's settings in `stream`; their defaults where the recipe gives none."""
        return next((each for each in self.stream_settings if isinstance(each, cls)), None) or cls()


@dataclass(frozen=True)
class Split:
    """The samples of one split, and where each was read."""

    examples: list[Example]
    origin: str
    """File (or data set and split) for messages."""
    positions: Sequence[int]
    """Per sample its place in the origin."""
    unit: str = "record"
    """What `positions` counts: records from 0, or lines from 1."""

    def where(self, index: int) -> str:
        """Place of sample `index` in words."""
        return f"{self.origin}, {self.unit} {self.positions[index]}"


@dataclass(frozen=True)
class RawTask:
    """A task as read, before limits are applied and its kind is settled."""

    train: Split
    evaluation: Split
    labels: tuple[str, ...] | None = None
    """Allowed answers where the format states them."""
    kind: Kind | None = None
    """Kind of the task where the format settles it; else it follows from the answers."""
    evaluated: ScoredOn | None = None
    """Which split `evaluation` is, where the reader knows better than `scored_on`."""

    @property
    def scored_on(self) -> ScoredOn | None:
        """Which split the evaluation split is, by the name of its file, its folder or its data set's split; None where
        nothing is called so.
        """
        if self.evaluated is not None:
            return self.evaluated
        origin = self.evaluation.origin
        if origin == self.train.origin:
            return "train"
        path, _, split = origin.removesuffix("]").partition("[")
        names = [split, Path(path).stem.rpartition(".")[2], Path(path).parent.name]
        return next((SPLITS[name.lower()] for name in names if name.lower() in SPLITS), None)
