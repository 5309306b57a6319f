"""What of the stream is done: `manifest.json`, replaced atomically after every task and every checkpoint."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from cl_dist import __version__
from cl_dist.errors import BadInput
from cl_dist.state.atomic import write_json
from cl_dist.state.integrity import CheckpointDamaged, StateUnusable, patiently

FORMAT_VERSION = 2
"""2: a list of checkpoints in place of one, and segments."""

NOTHING_SCORED: dict[str, Any] = {"row_under_way": (), "general_under_way": {}}
"""Where the next model has not been evaluated yet."""

SCORING = ("metric", "scored_on", "labels_from", "answers_outside_labels", "cut_generations")
"""What is kept of how a task was scored: the name of its score; the split; where its labels were found; how many of its
evaluation answers are none of them; how many generated answers `eval.max_new_tokens` has cut."""

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
    accuracy_matrix: tuple[tuple[float | None, ...], ...] = ()
    """Rows so far, the first one before training; None where a task was not evaluated."""
    row_under_way: tuple[float | None, ...] = ()
    """The next row, as far as it is: scores of the model that the newest saved state holds; empty before the first."""
    scoring: dict[str, dict[str, str | int]] = Field(default_factory=dict)
    """By task how it was scored the last time: `SCORING`, as far as it applies."""
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

    def __post_init__(self) -> None:
        """Refuse a manifest that contradicts itself."""
        if not 0 <= self.completed <= len(self.tasks):
            raise ValueError(f"completed is {self.completed} of {len(self.tasks)} tasks")
        for entry in self.checkpoints:
            if entry.task != self.completed:
                raise ValueError(f"the checkpoint is of task {entry.task}, {self.completed} are completed")
        self._check_matrix()

    def _check_matrix(self) -> None:
        rows = len(self.accuracy_matrix)
        if rows > self.completed + 1:
            raise ValueError(f"the accuracy matrix has {rows} rows, {self.completed} tasks are completed")
        under_way = (self.row_under_way,) if self.row_under_way else ()
        if any(len(row) != len(self.tasks) for row in (*self.accuracy_matrix, *under_way)):
            raise ValueError(f"a row of the accuracy matrix does not have {len(self.tasks)} scores, one per task")

    @property
    def checkpoint(self) -> CheckpointEntry | None:
        """Newest saved state of the task that is under way."""
        return self.checkpoints[-1] if self.checkpoints else None

    def scoring_by_task(self) -> dict[str, dict[str, str | int]]:
        """The entries of `scoring` by their names, and below these by task, as metrics.json has them."""
        return {
            name: {task: self.scoring[task][name] for task in self.tasks if name in self.scoring.get(task, {})}
            for name in SCORING
        }

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

    def write(self, path: Path) -> None:
        """Replace the file `path`, atomically and durably."""
        write_json(path, _ADAPTER.dump_python(self, mode="json"))

    @staticmethod
    def read(path: Path) -> Manifest:
        """Read a manifest; `BadInput` names the file where it is missing, damaged or of a newer format."""
        document = _read_object(path)
        version = document.get("format_version")
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise BadInput(
                f"{path} has format {version}, written by cl_dist {document.get('cl_dist_version')}; "
                f"this is cl_dist {__version__}, which reads formats up to {FORMAT_VERSION}"
            )
        try:
            return _ADAPTER.validate_python(_upgraded(document) if version == 1 else document)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "manifest"
            raise BadInput(f"{path} is damaged: {where}: {first['msg']}") from error


_ADAPTER: TypeAdapter[Manifest] = TypeAdapter(Manifest)


def _upgraded(document: dict[str, Any]) -> dict[str, Any]:
    """A manifest of format 1, which named one checkpoint or none, in today's format."""
    rest = {key: value for key, value in document.items() if key != "checkpoint"}
    entry = document.get("checkpoint")
    return {**rest, "checkpoints": [] if entry is None else [entry], "format_version": FORMAT_VERSION}


def _read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object; `BadInput` where it is none, or where the system does not give it after some seconds."""
    try:
        document = json.loads(patiently(path, path.read_bytes).decode("utf-8"))
    except CheckpointDamaged as error:
        raise BadInput(f"{error}: {path.parent} holds no run") from error
    except StateUnusable as error:
        raise BadInput(str(error)) from error
    except ValueError as error:
        raise BadInput(f"{path} is damaged: {error}") from error
    if not isinstance(document, dict):
        raise BadInput(f"{path} is damaged: it holds no JSON object")
    return document
