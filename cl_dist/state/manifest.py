"""What of the stream is done: `manifest.json`, replaced atomically after every task and every checkpoint.

The scores, which would make it grow with the square of the tasks, lie in `scores.jsonl` beside it (`state.scores`); the
manifest says at which bytes of that file those begin that count.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from cl_dist import __version__
from cl_dist.errors import BadInput
from cl_dist.state.atomic import write_json
from cl_dist.state.inputs import Inputs
from cl_dist.state.integrity import CheckpointDamaged
from cl_dist.state.scores import Row, ScoreFile
from cl_dist.state.stored_json import first_problem, read_object

FORMAT_VERSION = 3
"""2: a list of checkpoints in place of one, and segments. 3: scores in a file of their own, and inputs."""

NOTHING_SCORED: dict[str, Any] = {"row_under_way": (), "general_under_way": {}}
"""Where the next model has not been evaluated yet."""

_STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class CheckpointEntry:
    """A checkpoint inside a task."""

    task: int
    """Position of the task in the stream, from 0."""
    step: int
    """Optimiser steps of the task that are done."""
    folder: str
    """Folder of the checkpoint, relative to the run folder."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Segment:
    """Optimiser steps that were computed by as many ranks under one ZeRO stage, up to where the next segment begins."""

    task: int
    """Position in the stream, from 0, of the task in which it begins."""
    step: int
    """Optimiser steps of that task that were done before."""
    world_size: int
    """Number of ranks."""
    zero_stage: int
    """ZeRO stage."""
    micro_batch_size: int
    """Samples per rank and forward pass."""
    gradient_accumulation: int
    """Micro-batches per optimiser step and rank."""

    @property
    def split(self) -> tuple[int, int, int]:
        """How the global batch is divided: ranks, samples per micro-batch, micro-batches per rank."""
        return self.world_size, self.micro_batch_size, self.gradient_accumulation

    @property
    def global_batch(self) -> int:
        """Samples of an optimiser step over all ranks: the same in all segments of a run."""
        return self.world_size * self.micro_batch_size * self.gradient_accumulation

    def same_layout(self, other: Segment) -> bool:
        """Whether steps of both were computed alike."""
        return self.split == other.split and self.zero_stage == other.zero_stage


class ScorePlaces(NamedTuple):
    """Where in `scores.jsonl` the scores are that count: what the manifest has in the place of the scores."""

    rows: tuple[int, ...] = ()
    """Byte at which the line of each row of the accuracy matrix begins."""
    under_way: int | None = None
    """Byte behind which the scores of the next row are; None where nothing has been written yet."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Manifest:
    """State of a run; `dataclasses.replace` makes the next one."""

    tasks: tuple[str, ...]
    """Names of the tasks, in order."""
    world_size: int
    """Number of ranks of the newest start."""
    zero_stage: int
    """ZeRO stage of the newest start."""
    status: Literal["running", "interrupted", "finished", "failed"] = "running"
    """`running` also stands in the folder of a run that was killed."""
    completed: int = 0
    """Number of tasks that are trained, evaluated and saved."""
    checkpoints: tuple[CheckpointEntry, ...] = ()
    """Saved states of the task that is under way, the newest last."""
    segments: tuple[Segment, ...] = ()
    """Which ranks computed which steps, in order; empty in a manifest of format 1."""
    inputs: Inputs | None = None
    """Digests of the data, the base model and the tokenizer; None in a run of a release that took none."""
    accuracy_matrix: tuple[Row, ...] = ()
    """Rows so far, the first one before training; None where a task was not evaluated."""
    row_under_way: Row = ()
    """The next row, as far as it is: scores of the model that the newest saved state holds; empty before the first."""
    general: tuple[dict[str, Any], ...] = ()
    """Measurements of general ability, in order: `after` (a task's name or `untouched`) and `scores` by task of the
    harness, each with `score`, `metric`, `metrics` and `samples`."""
    general_under_way: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """The next measurement, as far as it is: for each name in the recipe that is done, scores as in `general`."""
    peak_memory_bytes: tuple[int, ...] = ()
    """Largest memory that each rank has used so far, over all restarts; as long as the largest number of ranks."""
    restarts: int = 0
    """How often the run was resumed."""
    timings: tuple[dict[str, int | float], ...] = ()
    """Seconds by name (such as "train", "evaluate"), one entry per completed task."""
    format_version: int = FORMAT_VERSION
    """Version of this file's format."""
    cl_dist_version: str = __version__
    """Release that wrote this."""
    scores: ScorePlaces = dataclasses.field(default=ScorePlaces(), compare=False)
    """Where `accuracy_matrix` and `row_under_way` are on the disk."""
    written: tuple[Row, ...] = dataclasses.field(default=(), compare=False, repr=False)
    """The rows that are at `scores.rows`; not a part of the file."""

    def __post_init__(self) -> None:
        """Refuse a manifest that contradicts itself."""
        if not 0 <= self.completed <= len(self.tasks):
            raise ValueError(f"completed is {self.completed} of {len(self.tasks)} tasks")
        for entry in self.checkpoints:
            if entry.task != self.completed:
                raise ValueError(f"the checkpoint is of task {entry.task}, {self.completed} are completed")
        self._check_matrix()
        self._check_general()

    def _check_matrix(self) -> None:
        rows = len(self.accuracy_matrix)
        if rows > self.completed + 1:
            raise ValueError(f"the accuracy matrix has {rows} rows, {self.completed} tasks are completed")
        under_way = (self.row_under_way,) if self.row_under_way else ()
        if any(len(row) != len(self.tasks) for row in (*self.accuracy_matrix, *under_way)):
            raise ValueError(f"a row of the accuracy matrix does not have {len(self.tasks)} scores, one per task")

    def _check_general(self) -> None:
        for entry in self.general:
            scores = entry.get("scores")
            if not isinstance(entry.get("after"), str) or not isinstance(scores, dict):
                raise ValueError("an entry of general does not have the place `after` and `scores`")
            for name, values in scores.items():
                if not _is_general_score(values):
                    raise ValueError(f"general: {name} does not have a score, metrics and a number of samples")

    @property
    def checkpoint(self) -> CheckpointEntry | None:
        """Newest saved state of the task that is under way."""
        return self.checkpoints[-1] if self.checkpoints else None

    def taken_back(self) -> Manifest:
        """As it was when training of the newest completed task began; restarts, segments and memory stay."""
        kept = self.completed - 1
        general = tuple(entry for entry in self.general if entry["after"] not in self.tasks[kept:])
        return replace(
            self,
            status="running",
            completed=kept,
            checkpoints=(),
            accuracy_matrix=self.accuracy_matrix[: kept + 1],
            general=general,
            timings=self.timings[:kept],
            **NOTHING_SCORED,
        )

    def write(self, path: Path) -> Manifest:
        """Replace the file `path`, atomically and durably, after appending what is new to the scores beside it.

        Returns the manifest with the places of its scores. Raises `ClDistError` where the disk is full.
        """
        file = ScoreFile(score_file(path))
        kept = 0
        while kept < min(len(self.written), len(self.accuracy_matrix)) and self._is_written(kept):
            kept += 1
        rows = (*self.scores.rows[:kept], *file.append_rows(self.accuracy_matrix[kept:]))
        places = ScorePlaces(rows, self._under_way(file))
        stored = replace(self, scores=places, written=self.accuracy_matrix)
        document = _ADAPTER.dump_python(stored, mode="json", exclude=_NOT_IN_THE_FILE)
        write_json(path, {**document, "accuracy_matrix": places.rows, "row_under_way": places.under_way})
        return stored

    def _is_written(self, row: int) -> bool:
        ours, theirs = self.accuracy_matrix[row], self.written[row]
        return ours is theirs or ours == theirs

    def _under_way(self, file: ScoreFile) -> int:
        """Behind which byte the scores of the row under way are; they are appended where they are not there yet."""
        if self.row_under_way and self.scores.under_way is not None:
            return self.scores.under_way
        begin = file.end()
        file.append_scores([(task, score) for task, score in enumerate(self.row_under_way) if score is not None])
        return begin

    def with_score(self, task: int, score: float) -> Manifest:
        """The manifest with one more score of the row under way, which `append_score` puts on the disk."""
        row = self.row_under_way or (None,) * len(self.tasks)
        # Not `replace`: it would check the whole matrix for every score.
        changed = copy.copy(self)
        object.__setattr__(changed, "row_under_way", (*row[:task], score, *row[task + 1 :]))
        return changed

    def append_score(self, path: Path, task: int, score: float) -> None:
        """Append the score of a task to the row under way, durably; `path` holds this manifest already."""
        ScoreFile(score_file(path)).append_scores([(task, score)])

    @staticmethod
    def read(path: Path) -> Manifest:
        """Read a manifest with its scores; `BadInput` names the file that is missing, damaged or of a newer format."""
        document = _read_object(path)
        version = document.get("format_version")
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise BadInput(
                f"{path} has format {version}, written by cl_dist {document.get('cl_dist_version')}; "
                f"this is cl_dist {__version__}, which reads formats up to {FORMAT_VERSION}"
            )
        with _named_where_damaged(path):
            return _ADAPTER.validate_python(_with_scores(_upgraded(document, version), path))


def _is_general_score(values: Any) -> bool:
    """Whether this is what general ability scores on a task of the harness."""
    if not isinstance(values, dict) or not isinstance(values.get("metrics"), dict):
        return False
    numbers = [values.get("score"), values.get("samples"), *values["metrics"].values()]
    return all(number is None or isinstance(number, int | float) for number in numbers)


@contextmanager
def _named_where_damaged(path: Path) -> Iterator[None]:
    """What pydantic refuses becomes one sentence that names the file and the entry."""
    try:
        yield
    except ValidationError as error:
        raise BadInput(f"{path} is damaged: {first_problem(error, 'manifest')}") from error


def score_file(manifest: Path) -> Path:
    """Where the scores of a manifest are."""
    return manifest.with_name("scores.jsonl")


def _with_scores(document: dict[str, Any], path: Path) -> dict[str, Any]:
    """A manifest's content with the scores in place of the bytes at which they are; older releases had them there."""
    file = ScoreFile(score_file(path))
    rows, under_way = document.get("accuracy_matrix"), document.get("row_under_way")
    found: dict[str, Any] = {}
    if isinstance(rows, list) and rows and all(type(place) is int for place in rows):
        matrix = file.rows(rows)
        found |= {"accuracy_matrix": matrix, "written": matrix}
    places = ScorePlaces(tuple(rows or ()) if found else (), under_way if type(under_way) is int else None)
    if places.under_way is not None:
        scored, names = dict(file.scores_after(places.under_way)), document.get("tasks")
        count = len(names) if scored and isinstance(names, list) else 0
        found["row_under_way"] = [scored.get(task) for task in range(count)]
    return {**document, **found, "scores": places}


_NOT_IN_THE_FILE = {"accuracy_matrix", "row_under_way", "scores", "written"}
_ADAPTER: TypeAdapter[Manifest] = TypeAdapter(Manifest)


def _upgraded(document: dict[str, Any], version: Any) -> dict[str, Any]:
    """A manifest of format 1, which named one checkpoint or none, or 2, which held the scores, in today's format."""
    if version not in (1, 2):
        return document
    document = {**document, "format_version": FORMAT_VERSION}
    if version == 1:
        entry = document.pop("checkpoint", None)
        document["checkpoints"] = [] if entry is None else [entry]
    return document


def _read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object; `BadInput` where it is none, or where the system does not give it after some seconds."""
    try:
        return read_object(path)
    except BadInput as error:
        if isinstance(error.__cause__, CheckpointDamaged):
            raise BadInput(f"{error}: {path.parent} holds no run") from error
        raise
