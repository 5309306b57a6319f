"""What of the stream is done: `manifest.json`, replaced atomically after every task and every checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from cl_dist import __version__
from cl_dist.errors import BadInput
from cl_dist.state.atomic import write_json

FORMAT_VERSION = 1

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
class Manifest:
    """State of a run; `dataclasses.replace` makes the next one."""

    tasks: tuple[str, ...]
    """Names of the tasks, in order."""
    world_size: int
    """Number of ranks that wrote this."""
    zero_stage: int
    """ZeRO stage that it ran under."""
    status: Literal["running", "interrupted", "finished", "failed"] = "running"
    """`running` also stands in the folder of a run that was killed."""
    completed: int = 0
    """Number of tasks that are trained, evaluated and saved."""
    checkpoint: CheckpointEntry | None = None
    """Newest checkpoint inside the task that is under way."""
    accuracy_matrix: tuple[tuple[float | None, ...], ...] = ()
    """Rows so far, the first one before training; None where a task was not evaluated."""
    peak_memory_bytes: tuple[int, ...] = ()
    """Largest memory that each rank has used so far, over all restarts."""
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
        if self.checkpoint is not None and self.checkpoint.task != self.completed:
            raise ValueError(f"the checkpoint is of task {self.checkpoint.task}, {self.completed} are completed")
        self._check_matrix()

    def _check_matrix(self) -> None:
        rows = len(self.accuracy_matrix)
        if rows > self.completed + 1:
            raise ValueError(f"the accuracy matrix has {rows} rows, {self.completed} tasks are completed")
        if any(len(row) != len(self.tasks) for row in self.accuracy_matrix):
            raise ValueError(f"a row of the accuracy matrix does not have {len(self.tasks)} scores, one per task")

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
            return _ADAPTER.validate_python(document)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "manifest"
            raise BadInput(f"{path} is damaged: {where}: {first['msg']}") from error


_ADAPTER: TypeAdapter[Manifest] = TypeAdapter(Manifest)


def _read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object; `BadInput` where it is none."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BadInput(f"{path} is missing: {path.parent} holds no run") from error
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} is damaged: {error}") from error
    if not isinstance(document, dict):
        raise BadInput(f"{path} is damaged: it holds no JSON object")
    return document
