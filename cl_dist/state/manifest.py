"""How far a run has come: `manifest.json`, replaced atomically after every task and every checkpoint.

The scores grow with the square of the number of tasks, so they are in a file of their own, `scores.jsonl`
(`state.scores`). The manifest has the byte offsets of the lines that count.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from cl_dist import __version__
from cl_dist.errors import BadInput
from cl_dist.state.atomic import write_json
from cl_dist.state.inputs import Inputs
from cl_dist.state.integrity import CheckpointDamaged
from cl_dist.state.scores import Cut, How, Row, ScoreFile, TaskScored
from cl_dist.state.stored_files import first_problem, read_object

FORMAT_VERSION = 4
"""2: a list of checkpoints instead of one, and segments. 3: scores in a separate file, and inputs. 4: the device."""

NOTHING_SCORED: dict[str, Any] = {"row_under_way": (), "general_under_way": {}}
"""The fields of a manifest whose current model has not been evaluated yet."""

CUT_GENERATIONS = "cut_generations"
SCORING = ("metric", "mode", "scored_on", "samples", "labels_from", "answers_outside_labels", CUT_GENERATIONS)
"""What is recorded about how a task was scored: its metric and mode; the split and the number of its samples; where its
labels come from; how many evaluation answers are not among them; how many generated answers were cut at
`eval.max_new_tokens`. Older releases recorded less."""

_STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class CheckpointEntry:
    """A checkpoint inside a task."""

    task: int
    """Position of the task in the stream, from 0."""
    step: int
    """Number of completed optimiser steps of the task."""
    folder: str
    """Folder of the checkpoint, relative to the run folder."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Segment:
    """Optimiser steps computed with one number of ranks, batch split and ZeRO stage, up to the next segment."""

    task: int
    """Position in the stream, from 0, of the task where it begins."""
    step: int
    """Number of optimiser steps of that task completed before."""
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
        """How the global batch is split: ranks, samples per micro-batch, micro-batches per rank."""
        return self.world_size, self.micro_batch_size, self.gradient_accumulation

    @property
    def global_batch(self) -> int:
        """Samples per optimiser step over all ranks; the same in all segments of a run."""
        return self.world_size * self.micro_batch_size * self.gradient_accumulation

    def same_layout(self, other: Segment) -> bool:
        """Whether both have the same split and ZeRO stage."""
        return self.split == other.split and self.zero_stage == other.zero_stage


class ScorePlaces(NamedTuple):
    """Where in `scores.jsonl` the valid scores are; the manifest stores this instead of the scores."""

    rows: tuple[int, ...] = ()
    """Byte offset of the line of each row of the accuracy matrix."""
    under_way: int | None = None
    """Byte offset after which the scores of the current row are; None if nothing has been written yet."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Manifest:
    """The progress of a run. Immutable; `dataclasses.replace` makes the next version."""

    tasks: tuple[str, ...]
    """Names of the tasks, in order."""
    world_size: int
    """Number of ranks since the last start."""
    zero_stage: int
    """ZeRO stage since the last start."""
    status: Literal["running", "interrupted", "finished", "failed"] = "running"
    """A run that was killed is still `running` here."""
    completed: int = 0
    """Number of tasks that are trained, evaluated and saved."""
    checkpoints: tuple[CheckpointEntry, ...] = ()
    """Checkpoints of the current task, newest last."""
    segments: tuple[Segment, ...] = ()
    """Which ranks computed which steps, in order; empty in a manifest of format 1."""
    inputs: Inputs | None = None
    """Digests of data, base model and tokenizer; None if the run was started by a release without digests."""
    accuracy_matrix: tuple[Row, ...] = ()
    """Rows so far; the first is from before training. None for a task that was not evaluated."""
    cut_matrix: tuple[Cut, ...] = dataclasses.field(default=(), compare=False)
    """For each row, how many generated answers were cut; older releases recorded none."""
    row_under_way: Row = ()
    """The scores so far of the current row, for the model in the newest saved state; empty before the first score."""
    scoring: dict[str, How] = Field(default_factory=dict)
    """How each task was last scored, by task name: the entries of `SCORING` that apply."""
    general: tuple[dict[str, Any], ...] = ()
    """Measurements of general ability, in order: `after` (a task's name or `untouched`) and `scores` by harness task,
    each with `score`, `metric`, `metrics` and `samples`."""
    general_under_way: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """The current measurement: scores as in `general`, for each name in the recipe that is done."""
    peak_memory_bytes: tuple[int, ...] = ()
    """Peak memory of each rank over all restarts; one entry per rank of the largest start."""
    kept_share: tuple[float | None, ...] = ()
    """Share of the trainable elements that each completed task has updated; None if unknown, or if it had no steps."""
    state_bytes: tuple[int, ...] = ()
    """Most bytes of gradient, masters and moments that each rank has held, over all restarts."""
    restarts: int = 0
    """Number of times the run was resumed."""
    device: dict[str, Any] | None = None
    """What the last start computed on (`engine.distributed.Joined.to_dict`); None if an older release recorded none."""
    timings: tuple[dict[str, int | float], ...] = ()
    """Seconds by name (such as "train", "evaluate"), one entry per completed task."""
    format_version: int = FORMAT_VERSION
    """Version of this file's format."""
    cl_dist_version: str = __version__
    """Release that wrote the file."""
    scores: ScorePlaces = dataclasses.field(default=ScorePlaces(), compare=False)
    """Where `accuracy_matrix` and `row_under_way` are on disk."""
    written: tuple[tuple[Row, Cut], ...] = dataclasses.field(default=(), compare=False, repr=False)
    """The rows, with their cuts, that are stored at `scores.rows`; not part of the file."""

    def __post_init__(self) -> None:
        """Raise ValueError if the manifest contradicts itself."""
        if not 0 <= self.completed <= len(self.tasks):
            raise ValueError(f"completed is {self.completed} of {len(self.tasks)} tasks")
        for entry in self.checkpoints:
            if entry.task != self.completed:
                raise ValueError(f"the checkpoint belongs to task {entry.task}, but {self.completed} are completed")
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
                raise ValueError("an entry of general lacks `after` or `scores`")
            for name, values in scores.items():
                if not _is_general_score(values):
                    raise ValueError(f"general: {name} lacks a score, metrics or a number of samples")

    @property
    def checkpoint(self) -> CheckpointEntry | None:
        """Newest checkpoint of the current task."""
        return self.checkpoints[-1] if self.checkpoints else None

    def scoring_by_task(self) -> dict[str, dict[str, str | int]]:
        """`scoring` by entry and then by task, as in metrics.json."""
        return {
            name: {task: self.scoring[task][name] for task in self.tasks if name in self.scoring.get(task, {})}
            for name in SCORING
        }

    @property
    def notes(self) -> list[str]:
        """What readers of the scores need to know, a sentence each."""
        from cl_dist.progress import score_notes  # which imports rich, and most readers of a manifest show nothing

        return score_notes({**self.scoring_by_task(), "general": self.general})

    @property
    def rows_with_cuts(self) -> tuple[tuple[Row, Cut], ...]:
        """Each row of the accuracy matrix, with how many generated answers were cut."""
        return tuple(zip_longest(self.accuracy_matrix, self.cut_matrix[: len(self.accuracy_matrix)], fillvalue=()))

    def with_row(self, row: Row) -> dict[str, Any]:
        """The fields that change when the current row, whose tasks have just been scored, is complete."""
        scored = [task if score is not None else "" for task, score in zip(self.tasks, row, strict=True)]
        counts = [self.scoring.get(task, {}).get(CUT_GENERATIONS) for task in scored]
        cut = tuple(None if count is None else int(count) for count in counts)
        rows = (*self.rows_with_cuts, (row, cut if any(count is not None for count in cut) else ()))
        return {
            "accuracy_matrix": tuple(row for row, _ in rows),
            "cut_matrix": tuple(cut for _, cut in rows),
            **NOTHING_SCORED,
        }

    def taken_back(self) -> Manifest:
        """Undo the last completed task: the manifest from before its training, except restarts, segments and memory."""
        kept = self.completed - 1
        general = tuple(entry for entry in self.general if entry["after"] not in self.tasks[kept:])
        return replace(
            self,
            status="running",
            completed=kept,
            checkpoints=(),
            accuracy_matrix=self.accuracy_matrix[: kept + 1],
            cut_matrix=self.cut_matrix[: kept + 1],
            general=general,
            timings=self.timings[:kept],
            kept_share=self.kept_share[:kept],
            **NOTHING_SCORED,
        )

    def write(self, path: Path) -> Manifest:
        """Append new scores to their file, then replace the file `path` atomically and durably.

        Returns the manifest with the places of its scores. Raises `ClDistError` if the disk is full.
        """
        file = ScoreFile(score_file(path))
        # Rows that are already on disk keep their place; the others are appended.
        kept, complete = 0, self.rows_with_cuts
        while kept < min(len(self.written), len(complete)) and _same(complete[kept], self.written[kept]):
            kept += 1
        new = complete[kept:]
        rows = (*self.scores.rows[:kept], *file.append_rows([row for row, _ in new], [cut for _, cut in new]))
        places = ScorePlaces(rows, self._under_way(file))
        stored = replace(self, scores=places, written=complete)
        document = _ADAPTER.dump_python(stored, mode="json", exclude=_NOT_IN_THE_FILE)
        write_json(path, {**document, "accuracy_matrix": places.rows, "row_under_way": places.under_way})
        return stored

    def _under_way(self, file: ScoreFile) -> int:
        """The byte offset after which the scores of the current row are; appends them if they are not on disk yet."""
        if self.row_under_way and self.scores.under_way is not None:
            return self.scores.under_way
        begin = file.end()
        known = [(task, score) for task, score in enumerate(self.row_under_way) if score is not None]
        file.append_scores([TaskScored(task, score, how={}) for task, score in known])
        return begin

    def with_score(self, scored: TaskScored) -> Manifest:
        """The manifest with one more score in the current row; `append_score` writes it to disk."""
        row, task = self.row_under_way or (None,) * len(self.tasks), scored.task
        # `replace` would validate the whole matrix for every score.
        changed = copy.copy(self)
        object.__setattr__(changed, "row_under_way", (*row[:task], scored.score, *row[task + 1 :]))
        if scored.how:
            object.__setattr__(changed, "scoring", {**self.scoring, self.tasks[task]: scored.how})
        return changed

    def append_score(self, path: Path, scored: TaskScored) -> None:
        """Append a score to the current row on disk, durably. This manifest must already be at `path`."""
        ScoreFile(score_file(path)).append_scores([scored])

    @staticmethod
    def read(path: Path) -> Manifest:
        """Read a manifest with its scores. Raises `BadInput` for a missing or damaged file or one of a newer format."""
        document = _read_object(path)
        version = document.get("format_version")
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise BadInput(
                f"{path} has format {version}, written by cl_dist {document.get('cl_dist_version')}; "
                f"this is cl_dist {__version__}, which reads formats up to {FORMAT_VERSION}"
            )
        try:
            return _ADAPTER.validate_python(_with_scores(_upgraded(document, version), path))
        except ValidationError as error:
            raise BadInput(f"{path} is damaged: {first_problem(error, 'manifest')}") from error


def _is_general_score(values: Any) -> bool:
    """Whether this is a well-formed score of a harness task."""
    if not isinstance(values, dict) or not isinstance(values.get("metrics"), dict):
        return False
    numbers = [values.get("score"), values.get("samples"), *values["metrics"].values()]
    return all(number is None or isinstance(number, int | float) for number in numbers)


def _same(ours: tuple[Row, Cut], theirs: tuple[Row, Cut]) -> bool:
    return (ours[0] is theirs[0] or ours[0] == theirs[0]) and ours[1] == theirs[1]


def score_file(manifest: Path) -> Path:
    """The file with the scores of a manifest."""
    return manifest.with_name("scores.jsonl")


def _with_scores(document: dict[str, Any], path: Path) -> dict[str, Any]:
    """A manifest's content with byte offsets replaced by the scores they refer to.

    Older formats have the scores themselves, which are left as they are. So is anything malformed: validation follows.
    """
    file = ScoreFile(score_file(path))
    rows, under_way = document.get("accuracy_matrix"), document.get("row_under_way")
    found: dict[str, Any] = {}
    # Complete rows.
    if isinstance(rows, list) and rows and all(type(place) is int for place in rows):
        complete = file.rows_and_cuts(rows)
        found |= {
            "accuracy_matrix": tuple(row for row, _ in complete),
            "cut_matrix": tuple(cut for _, cut in complete),
            "written": complete,
        }
    places = ScorePlaces(tuple(rows or ()) if found else (), under_way if type(under_way) is int else None)
    # The current row, and how its tasks were scored.
    if places.under_way is not None:
        lines, names = list(file.scores_after(places.under_way)), document.get("tasks")
        names = names if lines and isinstance(names, list) else []
        scored = {line.task: line.score for line in lines}
        found["row_under_way"] = [scored.get(task) for task in range(len(names))]
        how = {names[line.task]: line.how for line in lines if line.how and line.task < len(names)}
        if how and isinstance(document.get("scoring", {}), dict):
            found["scoring"] = {**document.get("scoring", {}), **how}
    return {**document, **found, "scores": places}


_NOT_IN_THE_FILE = {"accuracy_matrix", "cut_matrix", "row_under_way", "scores", "written"}
_ADAPTER: TypeAdapter[Manifest] = TypeAdapter(Manifest)


def _upgraded(document: dict[str, Any], version: Any) -> dict[str, Any]:
    """Convert format 1, which had at most one checkpoint, 2, which had the scores inline, and 3 to the current one."""
    if version not in (1, 2, 3):
        return document
    document = {**document, "format_version": FORMAT_VERSION}
    if version == 1:
        entry = document.pop("checkpoint", None)
        document["checkpoints"] = [] if entry is None else [entry]
    return document


def _read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises `BadInput` if it is missing, unreadable or something else."""
    try:
        return read_object(path)
    except BadInput as error:
        if isinstance(error.__cause__, CheckpointDamaged):
            raise BadInput(f"{error}: {path.parent} holds no run") from error
        raise
