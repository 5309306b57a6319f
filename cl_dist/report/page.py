"""report.md: the tables of a run, with its pictures."""

from __future__ import annotations

import inspect
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from cl_dist.evaluation import metrics
from cl_dist.progress import own_and_last, score_notes
from cl_dist.report.escape import Markdown, markdown_code, markdown_text
from cl_dist.report.reading import RunData
from cl_dist.report.tables import general_names, markdown
from cl_dist.report.units import UnitResults
from cl_dist.state.manifest import Manifest

MATRIX_FILE = "accuracy_matrix.csv"
"""Written where the matrix is too wide for the page."""
TOP_UNITS = 5
"""Units that are named per task."""
MIB = 2**20

SETTINGS = {
    "model": "model.name_or_path",
    "LoRA rank": "model.lora.r",
    "epochs": "train.epochs",
    "learning rate": "train.learning_rate",
    "seed": "train.seed",
}
"""Settings of the recipe that head a report."""

CAPTIONS = {
    "accuracy_matrix.png": "Row: the model after a task, the untouched one first. Column: the task that it is scored "
    "on. A frame marks the task that was just trained; – or pale is not evaluated.",
    "scores.png": "Each task's score over the stream (blue), beside those of the other tasks (grey). The orange mark "
    "is the score right after the task's own training. More than 25 tasks share one panel, in which the blue line is "
    "the mean over the tasks trained so far.",
    "loss.png": "Training loss over the optimiser steps; dashed lines are the borders of tasks. Where a task has 40 "
    "steps or more, the strong line is the mean over a twentieth of them.",
    "unit_importance.png": "Importance of the skill units to each task: the scores that fusion uses, min-max "
    "normalised per task (1: the task's most important unit). The colours are logarithmic; 0.00001 and less are one "
    "colour. Where there are many units, a column is a module and its colour the mean of its units, weighted by their "
    "number of elements: [unit_importance.csv](unit_importance.csv) has every unit.",
    "task_correlation.png": "Pearson's correlation of two tasks' normalised unit scores. Where all units of a task "
    "have the same score, or one that is not a number, it is not defined and shown as –. "
    "[task_correlation.csv](task_correlation.csv) has the numbers.",
    "fusion.png": "What fusion did to every module: the share of the weights after the task (new) in the mixture with "
    "those before it (old), as the mean over the module's units by elements. The colours are centred on one half. "
    "The first task is not fused. [fusion.csv](fusion.csv) also has the least and the largest share of a module's "
    "units.",
}
"""What each picture shows, by its file."""


@dataclass(frozen=True)
class Page:
    """What the page is made of."""

    run: RunData
    units: UnitResults | None
    """What the finished tasks left about skill units."""
    files: Collection[str]
    """Names of the pictures and CSV files beside the page."""
    missing: Sequence[str]
    """What could not be shown, and why."""

    def render(self, out: Path) -> str:
        """The page as Markdown, for the folder `out`."""
        parts = [*self._head(out), *self._scores(), *self._general(), *self._training(), *self._units()]
        if self.missing:
            parts += ["## What is missing", "\n".join(f"- {markdown_text(text)}" for text in self.missing)]
        return "\n\n".join(parts) + "\n"

    def _head(self, out: Path) -> Iterator[str]:
        run, manifest = self.run, self.run.manifest
        yield f"# Run {markdown_text(run.folder.path.resolve().name)}"
        yield f"{len(run.done)} of {len(manifest.tasks)} tasks are done; status: {manifest.status}."
        # A manifest of format 1 has no segments: its run had one number of ranks and one stage.
        layouts = manifest.segments or (manifest,)
        ranks = "; then ".join(f"{layout.world_size}, ZeRO stage {layout.zero_stage}" for layout in layouts)
        lines = [*_settings(run.settings), ["ranks", ranks], ["restarts", str(manifest.restarts)]]
        yield markdown(["setting", "value"], lines, text=(0, 1))
        if run.settings:
            link = Path(os.path.relpath(run.folder.config, out)).as_posix()
            yield f"All settings: [config.yaml](<{quote(link)}>)."

    def _scores(self) -> Iterator[str]:
        tasks, matrix = self.run.manifest.tasks, self.run.manifest.accuracy_matrix
        if not matrix:
            return
        yield "## Scores"
        if MATRIX_FILE in self.files:
            yield f"Each task right after its own training and now; the matrix is in [{MATRIX_FILE}]({MATRIX_FILE})."
            lines = ([task, *map(_score, scores)] for task, *scores in own_and_last(tasks, matrix))
            yield markdown(["task", "after its training", "now"], lines)
        else:
            rows = ["untouched", *(f"after {name}" for name in tasks)]
            lines = ([label, *map(_score, row)] for label, row in zip(rows, matrix, strict=False))
            yield markdown(["model", *tasks], lines)
        if self.run.log.metrics:
            yield f"Scored by {markdown_text(_scored_by(self.run.log.metrics))}."
        yield from self._pictures("accuracy_matrix.png", "scores.png")
        yield from self._metrics()

    def _metrics(self) -> Iterator[str]:
        """The metrics over the tasks that are done."""
        done, matrix = len(self.run.done), self.run.manifest.accuracy_matrix
        if done == 0:
            return
        if done < len(self.run.manifest.tasks):
            yield f"The metrics so far, as if the stream ended with {markdown_text(self.run.done[-1])}:"
        values = metrics.all_metrics([row[:done] for row in matrix])
        del values["forward_transfer_single"]  # a run knows nothing of models trained on one task alone
        yield from _notes(self.run.manifest)
        lines = ([markdown_code(name), _score(value), definition(name)] for name, value in values.items())
        header = ["metric", "value", "definition (T tasks, score a[i][j] on task j after task i)"]
        yield markdown(header, lines, text=(0, 2))

    def _general(self) -> Iterator[str]:
        """Scores of lm-evaluation-harness."""
        measured, tasks = self.run.manifest.general, self.run.done
        if not measured:
            return
        names = general_names(measured)
        yield "## General ability"
        rows = ([entry["after"], *(entry["scores"].get(name, {}).get("score") for name in names)] for entry in measured)
        yield markdown(["after", *names], ([place, *map(_score, values)] for place, *values in rows))
        if tasks:
            found = [metrics.general_ability(measured, tasks), metrics.general_forgetting(measured, tasks)]
            lines = [
                [markdown_code(metric.__name__), _score(value), definition(metric.__name__)]
                for metric, value in zip((metrics.general_ability, metrics.general_forgetting), found, strict=True)
            ]
            yield markdown(["metric", "value", "definition"], lines, text=(0, 2))

    def _training(self) -> Iterator[str]:
        pictures = list(self._pictures("loss.png"))
        if not pictures and not self.run.done:
            return
        yield "## Training"
        yield from pictures
        if self.run.done:
            header = ["task", "steps", "training, s", "tokens per second", "evaluation, s"]
            lines = zip(self.run.done, map(_timing, self.run.manifest.timings), strict=False)
            yield markdown(header, ([name, *cells] for name, cells in lines))
        if peaks := self.run.manifest.peak_memory_bytes:
            yield f"Peak memory of each rank, MiB: {', '.join(f'{peak / MIB:.0f}' for peak in peaks)}."

    def _units(self) -> Iterator[str]:
        if self.units is None:
            return
        table = self.units.table
        yield "## Skill units"
        yield f"{len(table.names)} units in {len(table.modules)} modules, {int(table.elements.sum())} trained elements."
        yield from self._pictures("unit_importance.png")
        yield f"The {min(TOP_UNITS, len(table.names))} most important units of each task, and their importance:"
        yield markdown(["task", "units"], _top_units(self.run.done, self.units), text=(0, 1))
        yield from self._pictures("task_correlation.png", "fusion.png")

    def _pictures(self, *names: str) -> Iterator[str]:
        """Each picture that is there, with its caption."""
        for name in names:
            if name in self.files:
                yield f"![{name.removesuffix('.png').replace('_', ' ')}]({name})"
                yield CAPTIONS[name]


def _settings(settings: Mapping[str, Any]) -> Iterator[list[str]]:
    methods = settings.get("method")
    if isinstance(methods, list):
        yield ["method", ", ".join(str(each.get("name")) for each in methods if isinstance(each, dict))]
    for label, key in SETTINGS.items():
        value: Any = settings
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value is not None:
            yield [label, str(value)]


def _notes(manifest: Manifest) -> Iterator[str]:
    """What readers of the metrics must know, as a list; nothing where there is nothing."""
    if notes := score_notes(manifest.scoring_by_task()):
        yield "\n".join(f"- {note[0].upper()}{note[1:]}." for note in notes)


def _scored_by(names: Mapping[str, str]) -> str:
    """`exact_match`, or which tasks by which score where they differ."""
    by_name: dict[str, list[str]] = {}
    for task, name in names.items():
        by_name.setdefault(name, []).append(task)
    if len(by_name) == 1:
        return next(iter(by_name))
    return "; ".join(f"{name}: {', '.join(tasks)}" for name, tasks in by_name.items())


def definition(name: str) -> str:
    """The first line of a metric's function; nothing for a name that has none."""
    return (inspect.getdoc(getattr(metrics, name, None)) or "").partition("\n")[0]


def _timing(entry: Mapping[str, float]) -> list[str]:
    seconds, tokens = entry.get("train_seconds"), entry.get("tokens")
    speed = tokens / seconds if tokens is not None and seconds else None
    values = (entry.get("steps"), seconds, speed, entry.get("evaluate_seconds"))
    return ["-" if value is None else f"{value:.{digits}f}" for value, digits in zip(values, (0, 1, 0, 1), strict=True)]


def _top_units(tasks: Sequence[str], units: UnitResults) -> Iterator[list[str]]:
    for task, scores in zip(tasks, units.importance, strict=True):
        if scores.min() == scores.max():
            yield [task, "all the same"]
            continue
        best = np.argsort(-scores, kind="stable")[:TOP_UNITS]
        named = (f"{markdown_code(units.table.names[unit])} {scores[unit]:.3g}" for unit in best)
        yield [task, Markdown(", ".join(named))]


def _score(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
