"""The layout of a run folder.

| place | content |
|---|---|
| `config.yaml` | the resolved recipe |
| `manifest.json` | how far the run has come |
| `scores.jsonl` | the scores; the manifest says which lines count |
| `metrics.json` | accuracy matrix and metrics |
| `log.jsonl` | one record per line |
| `data_order.jsonl` | which samples each optimiser step was trained on, one line per step |
| `logs/` | stacks of ranks that hung or crashed (`stack-rank<N>.txt`); heartbeats during the run |
| `tasks/NN-name/model/` | weights or adapter, in Hugging Face format |
| `tasks/NN-name/unfused/` | the model before a method changed it at the end of the task (kif, if configured) |
| `tasks/NN-name/units.json`, `unit_scores.safetensors` | skill units and their importance (kif, tasl, recurrent_kif) |
| `tasks/NN-name/kept_rows.safetensors` | in how many steps each row was kept (migu) |
| `tasks/NN-name/predictions/` | predictions after the task |
| `tasks/NN-name/state/` | what the next task starts from |
| `checkpoint/task-NN-step-NNNNNN/` | what an interrupted task resumes from |
| `tracking.json` | what identifies the run to its trackers (`track`) |
| `tensorboard/`, `wandb/` | files of these trackers |
| `report/` | tables and pictures made by `cl-dist report` |
| `slurm/NN/` | batch script, recipe and log of a Slurm job (`cl-dist slurm`) |
| `.lock` | locked by the run that writes here |
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cl_dist.errors import BadInput
from cl_dist.state import atomic
from cl_dist.state.stored_files import read_object

_TASK_NAME = re.compile(r"[A-Za-z0-9._-]{1,100}")
_SLURM_NAME = re.compile(r"\d{2,}")
_CHECKPOINT_NAME = re.compile(r"task-(\d{2,})-step-(\d{6,})")


@dataclass(frozen=True)
class TaskFolder:
    """The files of one task, in `tasks/NN-name`."""

    path: Path

    @property
    def model(self) -> Path:
        """Model or adapter after the task, in Hugging Face format."""
        return self.path / "model"

    @property
    def unfused(self) -> Path:
        """Model or adapter as trained, before the method changed it at the end of the task."""
        return self.path / "unfused"

    @property
    def units(self) -> Path:
        """Skill units, as slices of parameters (methods that fuse)."""
        return self.path / "units.json"

    @property
    def unit_scores(self) -> Path:
        """Importance of the skill units and their shares in fusion, in the order of `units` (methods that fuse)."""
        return self.path / "unit_scores.safetensors"

    @property
    def kept_rows(self) -> Path:
        """In how many of the task's steps each row of each masked weight was kept (methods that mask rows)."""
        return self.path / "kept_rows.safetensors"

    @property
    def predictions(self) -> Path:
        """Predictions after the task."""
        return self.path / "predictions"

    @property
    def state(self) -> Path:
        """State of the methods and of the training after the task."""
        return self.path / "state"


@dataclass(frozen=True)
class SlurmRecord:
    """The files of a Slurm job, in `slurm/NN`; its log is there too."""

    path: Path

    @property
    def script(self) -> Path:
        """Batch script as submitted."""
        return self.path / "job.sh"

    @property
    def recipe(self) -> Path:
        """Resolved recipe that the job runs."""
        return self.path / "recipe.yaml"

    @property
    def job(self) -> Path:
        """The job's number, written once it is submitted."""
        return self.path / "job.json"

    def read_job(self) -> dict[str, Any]:
        """Number (`job`) and `max_restarts` of the job. Raises `BadInput` if the file is damaged."""
        try:
            job = read_object(self.job)
            return {"job": str(job["job"]), "max_restarts": int(job["max_restarts"])}
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise BadInput(f"{self.job} is damaged: {error!r}") from error


@dataclass(frozen=True)
class RunFolder:
    """The paths in a run folder. Nothing is created, except by the methods that say so."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved recipe."""
        return self.path / "config.yaml"

    @property
    def manifest(self) -> Path:
        """How far the run has come (`cl_dist.state.manifest.Manifest`)."""
        return self.path / "manifest.json"

    @property
    def metrics(self) -> Path:
        """The accuracy matrix and the metrics."""
        return self.path / "metrics.json"

    @property
    def log(self) -> Path:
        """One JSON record per line."""
        return self.path / "log.jsonl"

    @property
    def data_order(self) -> Path:
        """Which samples each optimiser step was trained on (`cl_dist.state.data_order.DataOrder`)."""
        return self.path / "data_order.jsonl"

    @property
    def logs(self) -> Path:
        """Folder of heartbeats and stacks (`cl_dist.watchdog`)."""
        return self.path / "logs"

    @property
    def report(self) -> Path:
        """Folder of the tables and pictures made from the run."""
        return self.path / "report"

    @property
    def lock(self) -> Path:
        """Lock file (`cl_dist.state.lock.RunLock`)."""
        return self.path / ".lock"

    @property
    def tasks(self) -> Path:
        """Folder of the tasks' folders."""
        return self.path / "tasks"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints inside a task."""
        return self.path / "checkpoint"

    @property
    def slurm(self) -> Path:
        """Folder of the run's Slurm jobs; it may exist before the run does."""
        return self.path / "slurm"

    def new_slurm_record(self) -> SlurmRecord:
        """The record of the run's next Slurm job; the folder is not created."""
        return SlurmRecord(self.slurm / f"{1 + max(map(_number, self._slurm_folders()), default=0):02d}")

    def newest_slurm_record(self) -> SlurmRecord | None:
        """The record of the Slurm job that was submitted last."""
        submitted = [path for path in self._slurm_folders() if (path / "job.json").exists()]
        return SlurmRecord(max(submitted, key=_number)) if submitted else None

    def _slurm_folders(self) -> list[Path]:
        return [path for path in self.slurm.glob("*") if _SLURM_NAME.fullmatch(path.name)]

    def task(self, position: int, name: str) -> TaskFolder:
        """Folder of the task at `position` (from 0; folders count from 01). Raises `BadInput` for an invalid name."""
        if not _TASK_NAME.fullmatch(name):
            raise BadInput(f"task name {name!r}: letters, digits, '-', '_' and '.' are allowed, at most 100 of them")
        return TaskFolder(self.tasks / f"{position + 1:02d}-{name}")

    def checkpoint(self, task: int, step: int) -> Path:
        """Folder of the checkpoint after `step` optimiser steps of task `task` (from 0; folders count from 01)."""
        return self.checkpoints / f"task-{task + 1:02d}-step-{step:06d}"

    def stored_checkpoints(self) -> list[Path]:
        """Complete checkpoints, newest first."""
        found = [path for path in self.checkpoints.glob("task-*") if _CHECKPOINT_NAME.fullmatch(path.name)]
        return sorted(found, key=_task_and_step, reverse=True)

    def forget_checkpoints(self, but: Collection[Path] = ()) -> None:
        """Delete all checkpoints except those in `but`.

        If one cannot be deleted now (an open file on NFS), the next call tries again.
        """
        for path in self.stored_checkpoints():
            if path not in but:
                shutil.rmtree(path, ignore_errors=True)

    def append_log(self, record: dict[str, Any]) -> None:
        """Append a record to the log."""
        atomic.append_line(self.log, record)

    def recover(self) -> None:
        """Clean up after killed writes. Call this only while holding the lock."""
        atomic.recover(self.path)


def _number(folder: Path) -> int:
    return int(folder.name)


def _task_and_step(checkpoint: Path) -> tuple[int, int]:
    """Position (from 1) and step in the name of a checkpoint's folder."""
    match = _CHECKPOINT_NAME.fullmatch(checkpoint.name)
    if match is None:
        raise ValueError(f"{checkpoint} is not named like a checkpoint")
    return int(match[1]), int(match[2])
