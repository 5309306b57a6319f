"""Reads a run folder for its report, whether the run is finished or not."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cl_dist.config.yaml_text import parse_yaml
from cl_dist.errors import BadInput
from cl_dist.state.manifest import Manifest
from cl_dist.state.run_folder import RunFolder
from cl_dist.state.stored_files import read_stored_text

MOST_STEPS = 10_000_000
"""Steps of a task that a picture can show; a log record with a larger number is damaged."""

Losses = dict[int, float]
"""Training loss by optimiser step, from 1; NaN if it was not finite."""


@dataclass
class RunLog:
    """The contents of log.jsonl that a report needs."""

    losses: dict[str, Losses] = field(default_factory=dict)
    """By task."""
    metrics: dict[str, str] = field(default_factory=dict)
    """The metric of each evaluated task, such as exact_match."""
    unreadable: int = 0
    """Number of lines that are not records; a kill may cut a line off."""


@dataclass(frozen=True)
class RunData:
    """A run and its results so far."""

    folder: RunFolder
    manifest: Manifest
    settings: dict[str, Any]
    """The resolved recipe as written by any release; empty if there is none."""
    log: RunLog

    @property
    def done(self) -> tuple[str, ...]:
        """Names of the tasks that are trained, evaluated and saved."""
        return self.manifest.tasks[: self.manifest.completed]


def read_run(path: Path) -> RunData:
    """Read the manifest, the recipe and the log in the run folder `path`.

    Raises:
        BadInput: The folder does not exist or contains no run, or one of these files is damaged.
    """
    if not path.exists():
        raise BadInput(f"{path}: no such folder; give the run folder (output_dir) of a run")
    if not path.is_dir():
        raise BadInput(f"{path} is not a folder; give the run folder (output_dir) of a run")
    folder = RunFolder(path)
    manifest = Manifest.read(folder.manifest)
    rows = len(manifest.accuracy_matrix)
    if not manifest.tasks:
        raise BadInput(f"{folder.manifest} is damaged: it lists no tasks")
    if rows <= manifest.completed and manifest.completed > 0:
        raise BadInput(f"{folder.manifest} is damaged: {rows} rows of scores, but {manifest.completed} completed tasks")
    return RunData(folder, manifest, _read_settings(folder.config), read_log(folder.log, manifest.tasks))


def _read_settings(path: Path) -> dict[str, Any]:
    """The recipe as plain values, unchecked, since another release may have had different settings."""
    if not path.exists():
        return {}
    try:
        data = parse_yaml(read_stored_text(path), str(path))
    except BadInput as error:
        reason = str(error).removeprefix(f"{path}: ").removeprefix(f"{path} is damaged: ")
        raise BadInput(f"{path} is damaged: {reason}") from error
    if not isinstance(data, dict):
        raise BadInput(f"{path} is damaged: it contains no settings")
    return data


def read_log(path: Path, tasks: tuple[str, ...]) -> RunLog:
    """Read the log of a run over `tasks`; a missing file is an empty log, one that cannot be read is `BadInput`."""
    log = RunLog()
    for line in _lines(path):
        try:
            record = json.loads(line)
            if record.get("task") in tasks:
                _take(log, record)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
            log.unreadable += 1
    return log


def _lines(path: Path) -> Iterator[bytes]:
    if path.exists() and not path.is_file():
        raise BadInput(f"{path} is damaged: it is not a regular file")
    try:
        with path.open("rb") as file:
            yield from (line for line in file if line.strip())
    except FileNotFoundError:
        return
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}") from error


def _take(log: RunLog, record: dict[str, Any]) -> None:
    if record["event"] == "evaluation":
        log.metrics[record["task"]] = str(record["metric"])
    elif record["event"] == "step":
        step, loss = record["step"], record["loss"]
        if type(step) is not int or not 1 <= step <= MOST_STEPS:
            raise ValueError(f"step {step}")
        loss = math.nan if loss is None else float(loss)
        losses = log.losses.setdefault(record["task"], {})
        # A resumed run repeats the steps after its checkpoint, so the old records from this step on are obsolete.
        for undone in [number for number in reversed(losses) if number >= step] if step in losses else []:
            del losses[undone]
        losses[step] = loss
