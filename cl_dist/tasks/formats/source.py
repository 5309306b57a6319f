"""What a reader is given and what it gives back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cl_dist.config.files import expand, is_there
from cl_dist.config.schema import StreamConfig, TaskConfig
from cl_dist.errors import BadInput
from cl_dist.tasks.types import Example, Kind, ScoredOn

SPLITS: dict[str, ScoredOn] = {"test": "test", "dev": "dev", "eval": "dev", "validation": "dev", "valid": "dev"}
"""What formats call the splits that are evaluated on."""


@dataclass(frozen=True)
class Source:
    """Where a task's data is, with the settings that decide how it is read."""

    task: TaskConfig
    stream: StreamConfig
    recipe_dir: Path

    def path(self) -> Path:
        """The task's folder or file; `stream.root` itself where the task names none.

        Raises BadInput where the recipe names neither.
        """
        if self.task.path is not None:
            return self.resolve(self.task.path)
        if self.stream.root is None:
            raise BadInput(f"format {self.task.format!r} needs a path: set `path` of the task or `stream.root`")
        return self._root()

    def resolve(self, written: str) -> Path:
        """A path of the recipe as one to open: below `stream.root`, else below the recipe's folder, unless absolute."""
        path = expand(written, "path")
        below_root, beside_recipe = self._root() / path, self.recipe_dir / path
        return beside_recipe if is_there(beside_recipe) and not is_there(below_root) else below_root

    def _root(self) -> Path:
        """`stream.root`, itself relative to the recipe's folder; that folder where there is no root."""
        return self.recipe_dir / expand(self.stream.root or "", "stream.root")


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
