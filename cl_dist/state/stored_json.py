"""Files that the program itself has written, read as what they must be: anything else is one sentence, not a crash."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from cl_dist.errors import BadInput
from cl_dist.state.integrity import CheckpointDamaged, StateUnusable, patiently

MOST_BYTES = 1 << 28
"""Larger than any such file of a run; a larger one is not read into memory."""


def read_stored(path: Path) -> bytes:
    """The content of a file of a run, tried again for some seconds where the system does not give it.

    Raises:
        CheckpointDamaged: It is missing or a folder.
        StateUnusable: The system does not give it.
        BadInput: It is no file (a pipe would be waited for), or too large to be one of ours.
    """
    found = patiently(path, path.stat)
    if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
        raise BadInput(f"{path} is damaged: it is not a regular file")
    if found.st_size > MOST_BYTES:
        raise BadInput(f"{path} is damaged: it has {found.st_size} bytes, more than such a file ever has")
    return patiently(path, path.read_bytes)


def read_stored_text(path: Path) -> str:
    """As `read_stored`, for UTF-8; all that is wrong with the file is `BadInput`."""
    try:
        return read_stored(path).decode("utf-8")
    except (CheckpointDamaged, StateUnusable) as error:
        raise BadInput(str(error)) from error
    except ValueError as error:
        raise BadInput(f"{path} is damaged: {error}") from error


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object; `BadInput` where the file is missing, cannot be read or holds anything else."""
    text = read_stored_text(path)
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path} is damaged: {error}") from error
    if not isinstance(document, dict):
        raise BadInput(f"{path} is damaged: it holds no JSON object")
    return document


def first_problem(error: ValidationError, whole: str) -> str:
    """`key: what is wrong with it`, for the first entry that pydantic refuses; `whole` names the file's content."""
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"])) or whole
    return f"{where}: {first['msg']}"


class _Metrics(BaseModel):
    """What is read of metrics.json; it holds more."""

    model_config = ConfigDict(extra="allow", strict=True)

    accuracy_matrix: list[list[float | None]]
    tasks: list[str] | None = None
    average_performance: float | None = None
    backward_transfer: float | None = None
    forward_transfer_zero_shot: float | None = None
    forward_transfer_single: float | None = None
    forgetting: float | None = None
    learning_accuracy: float | None = None
    general_ability: float | None = None
    general_forgetting: float | None = None
    tokens_per_second: float | None = None

    @model_validator(mode="after")
    def _fits(self) -> _Metrics:
        """A row per model and a score per task."""
        width = len(self.tasks) if self.tasks is not None else len(next(iter(self.accuracy_matrix), ()))
        if any(len(row) != width for row in self.accuracy_matrix):
            raise ValueError(f"a row of the accuracy matrix does not have {width} scores, one per task")
        if self.tasks is not None and len(self.accuracy_matrix) > len(self.tasks) + 1:
            raise ValueError(f"{len(self.accuracy_matrix)} rows of scores for {len(self.tasks)} tasks")
        return self


def read_metrics(path: Path) -> dict[str, Any]:
    """metrics.json, with None for every metric that it lacks; `BadInput` where it is not what a run has written."""
    document = read_object(path)
    try:
        return _Metrics.model_validate(document).model_dump()
    except ValidationError as error:
        raise BadInput(f"{path} is damaged: {first_problem(error, 'metrics')}") from error
