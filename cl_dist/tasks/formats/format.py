"""What a data format is: a class that describes how data is stored, holds its own settings, and reads a task."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
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
"""The names that formats give to evaluation splits."""
DEV_NAMES = tuple(name for name, split in SPLITS.items() if split == "dev")

EmptyAnswers = Literal["error", "keep", "skip"]

FILES = frozenset({"root", "eval_split"})
ANSWERS = FILES | {"empty_answers"}
INFERRED = ANSWERS | {"max_labels"}
"""General settings of the stream that a format may use (`Format.USES`): for data in files; with answers; with labels
that may have to be inferred from the answers.
"""

Own = TypeVar("Own", bound="OwnSettings")


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(Field,))
class OwnSettings:
    """A format's own settings: the fields of a subclass, each with a type, a default and a docstring, its help text.

    Subclasses become frozen dataclasses with strictly checked fields, without a decorator. `__post_init__` may raise
    ValueError; its message starts with the name of a setting.
    """

    PATHS: ClassVar[tuple[str, ...]] = ()
    """Settings that contain a path. It is looked up like the path of a task."""
    FIXED: ClassVar[tuple[str, ...]] = ()
    """Settings that a resumed run must not change. All others only say where and how the data is read; a digest of the
    samples detects whether those changed."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        checked_dataclass(frozen=True, kw_only=True, config=STRICT)(cls)


class StreamSettings(OwnSettings):
    """A format's settings in `stream`, which apply to all tasks with this format (`Format.STREAM`)."""

    def check(self, formats: Collection[str]) -> None:
        """Raise ValueError if a setting does not fit the `formats` of the stream's tasks."""


def defaults_of(cls: type[OwnSettings]) -> dict[str, Any]:
    """Names and defaults of a format's settings (`dataclasses.MISSING` for a setting that must be given)."""
    return {field.name: field.default for field in dataclasses.fields(cls)}  # type: ignore[arg-type]


def paths_of(settings: OwnSettings) -> dict[str, str]:
    """The paths in a format's settings, by the name of the setting."""
    return {name: path for name in settings.PATHS if (path := getattr(settings, name)) is not None}


def with_paths(settings: Own, paths: Mapping[str, str | None]) -> Own:
    """The same settings with some paths replaced."""
    return dataclasses.replace(settings, **paths) if paths else settings  # type: ignore[type-var]


class Format(OwnSettings):
    """A way to store data. A subclass adds settings of a task (`stream.tasks[]`) as its fields; an instance holds those
    of one task.
    """

    name: ClassVar[str]
    """Its name in recipes."""
    summary: ClassVar[str] = ""
    """A few words for the help text."""
    USES: ClassVar[frozenset[str]] = INFERRED
    """The general settings of the stream that it reads, out of root, eval_split, empty_answers and max_labels."""
    STREAM: ClassVar[type[StreamSettings] | None] = None
    """The class of its settings in `stream`."""
    HAS_PATH: ClassVar[bool] = True
    """Whether its data has a path; otherwise the format generates it."""
    METRIC: ClassVar[str | None] = None
    """The metric that `eval.metric: auto` chooses for its tasks; None: it depends on the kind of task."""

    @property
    def only_documents(self) -> bool:
        """Whether the task certainly consists of plain text, without prompts and answers."""
        return False

    @classmethod
    def recognises(cls, folder: Path) -> bool:
        """Whether a folder is certainly in this format, so that `format: auto` may use it."""
        return False

    def is_at(self, path: Path) -> bool:
        """Whether a task's `path` leads to data; a format may accept more than existing files and folders."""
        return is_there(path)

    def read(self, source: Source) -> RawTask:
        """Read a task. Raises BadInput if its data is missing or broken; the caller adds the task's name."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a task's data is, and the stream's settings for reading it."""

    name: str
    """Name of the task."""
    format: str
    """Name of its format in the recipe."""
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
    seed: int = 0
    """`train.seed`, for formats that draw samples."""
    stream_settings: tuple[StreamSettings, ...] = ()

    def path(self) -> Path:
        """The task's folder or file, or `stream.root` if the task gives none. Raises BadInput if both are missing."""
        if self.path_in_recipe is not None:
            return self.resolve(self.path_in_recipe)
        if self.root is None:
            raise BadInput(f"format {self.format!r} needs a path: set `path` of the task or `stream.root`")
        return self._root()

    def resolve(self, written: str, is_at: Callable[[Path], bool] = is_there) -> Path:
        """Turn a path of the recipe into one to open: absolute, below `stream.root`, or in the recipe's folder.

        `is_at` says whether there is data at a path.
        """
        path = expand(written, "path")
        below_root, beside_recipe = self._root() / path, self.recipe_dir / path
        return beside_recipe if is_at(beside_recipe) and not is_at(below_root) else below_root

    def _root(self) -> Path:
        return self.recipe_dir / expand(self.root or "", "stream.root")

    def settings(self, cls: type[Own]) -> Own:
        """The settings in `stream` of class `cls`; its defaults if the recipe gives none."""
        return next((each for each in self.stream_settings if isinstance(each, cls)), None) or cls()


@dataclass(frozen=True)
class Split:
    """The samples of one split, and where each of them comes from."""

    examples: list[Example]
    origin: str
    """File (or data set and split) for messages."""
    positions: Sequence[int]
    """The position of each sample in the origin."""
    unit: str = "record"
    """What `positions` counts: records from 0, or lines from 1."""

    def where(self, index: int) -> str:
        """Where sample `index` comes from, in words."""
        return f"{self.origin}, {self.unit} {self.positions[index]}"


@dataclass(frozen=True)
class RawTask:
    """A task as its format reads it: sample limits are not applied yet, and its kind may still be open."""

    train: Split
    evaluation: Split
    labels: tuple[str, ...] | None = None
    """Allowed answers, if the data states them."""
    kind: Kind | None = None
    """Kind of the task, if the format determines it; otherwise it follows from the answers."""
    evaluated: ScoredOn | None = None
    """Which split `evaluation` is, if names do not show it (see `scored_on`)."""
    read_as: str = ""
    """What the records hold, and in which columns, if a format knows several ways."""

    @property
    def scored_on(self) -> ScoredOn | None:
        """Which split `evaluation` is, judging by the name of its file, folder or split; None if they do not say."""
        if self.evaluated is not None:
            return self.evaluated
        origin = self.evaluation.origin
        if origin == self.train.origin:
            return "train"
        path, _, split = origin.removesuffix("]").partition("[")
        names = [split, Path(path).stem.rpartition(".")[2], Path(path).parent.name]
        return next((SPLITS[name.lower()] for name in names if name.lower() in SPLITS), None)
