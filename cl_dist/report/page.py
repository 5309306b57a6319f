"""report.md: the tables and pictures of a run."""

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
from cl_dist.progress import own_and_last
from cl_dist.report.escape import Markdown, markdown_code, markdown_text
from cl_dist.report.reading import RunData
from cl_dist.report.tables import COUNTED, general_names, markdown, scoring_lines
from cl_dist.report.units import UnitResults

MATRIX_FILE = "accuracy_matrix.csv"
"""Written if the matrix is too wide for the page."""
TOP_UNITS = 5
"""Number of units listed per task."""
MIB = 2**20

SETTINGS = {
    "model": "model.name_or_path",
    "LoRA rank": "model.lora.r",
    "epochs": "train.epochs",
    "learning rate": "train.learning_rate",
    "seed": "train.seed",
}
"""Settings of the recipe at the top of a report."""

CAPTIONS = {
    "accuracy_matrix.png": "Rows: the model after each task, starting with the untouched model. Columns: the task it "
    "is scored on. Frames mark the task that was just trained; – or a pale cell means not evaluated.",
    "scores.png": "Each task's score over the stream (blue) and those of the other tasks (grey). The orange mark is "
    "the score right after the task's own training. If the tasks have different kinds of scores, each panel has its "
    "own scale, and grey lines only for tasks of its kind. With more than 25 tasks there is only one panel, in which "
    "the blue line is the mean over the tasks trained so far.",
    "loss.png": "Training loss over the optimiser steps; dashed lines separate the tasks. For tasks with 40 steps or "
    "more, the strong line is a moving mean over a twentieth of the steps.",
    "unit_importance.png": "Importance of the skill units to each task: the scores that fusion uses, min-max "
    "normalised per task (1: the task's most important unit). The colour scale is logarithmic; 0.00001 and less have "
    "the same colour. If there are many units, a column is a module and its colour the mean of the module's units, "
    "weighted by their number of elements; [unit_importance.csv](unit_importance.csv) lists every unit.",
    "task_correlation.png": "Pearson correlation between the normalised unit scores of two tasks. It is undefined, "
    "shown as –, if all units of a task have the same score or a score is not a number. "
    "[task_correlation.csv](task_correlation.csv) lists the numbers.",
    "fusion.png": "What fusion did to each module: the share of the weights after the task (new) in the mixture with "
    "the weights before it (old), as the mean over the module's units, weighted by elements. The colours are centred "
    "on one half. The first task is not fused. [fusion.csv](fusion.csv) also lists the smallest and the largest share "
    "among a module's units.",
}
"""The caption of each picture, by file name."""


@dataclass(frozen=True)
class Page:
    """The contents of the page."""

    run: RunData
    units: UnitResults | None
    """The skill units of the finished tasks, if their method has any."""
    files: Collection[str]
    """Names of the pictures and CSV files beside the page."""
    missing: Sequence[str]
    """What is not shown, and why."""

    def render(self, out: Path) -> str:
        """The page as Markdown; links are relative to the folder `out`."""
        parts = [*self._head(out), *self._scores(), *self._general(), *self._training(), *self._units()]
        if self.missing:
            parts += ["## What is missing", "\n".join(f"- {markdown_text(text)}" for text in self.missing)]
        return "\n\n".join(parts) + "\n"

    def _head(self, out: Path) -> Iterator[str]:
        run, manifest = self.run, self.run.manifest
        yield f"# Run {markdown_text(run.folder.path.resolve().name)}"
        yield f"{len(run.done)} of {len(manifest.tasks)} tasks are finished; status: {manifest.status}."
        # Format 1 of the manifest has no segments: such a run had a single world size and ZeRO stage.
        layouts = manifest.segments or (manifest,)
        ranks = "; then ".join(f"{layout.world_size}, ZeRO stage {layout.zero_stage}" for layout in layouts)
        lines = [*settings_of(run.settings), ["ranks", ranks], ["restarts", str(manifest.restarts)]]
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
            yield f"Scores right after each task's training and now; [{MATRIX_FILE}]({MATRIX_FILE}) has the matrix."
            lines = ([task, *map(_score, scores)] for task, *scores in own_and_last(tasks, matrix))
            yield markdown(["task", "after its training", "now"], lines)
        else:
            rows = ["untouched", *(f"after {name}" for name in tasks)]
            lines = ([label, *map(_score, row)] for label, row in zip(rows, matrix, strict=False))
            yield markdown(["model", *tasks], lines)
        if self.run.log.metrics:
            yield f"Scored by {markdown_text(_scored_by(self.run.log.metrics))}."
        header, ways = scoring_lines(tasks, self.run.manifest.scoring)
        if ways:
            yield "How each task was last scored:"
            yield markdown(header, ways, text=[at for at, name in enumerate(header) if name not in COUNTED])
        yield from self._pictures("accuracy_matrix.png", "scores.png")
        yield from self._metrics()

    def _metrics(self) -> Iterator[str]:
        """The metrics over the finished tasks."""
        done, matrix = len(self.run.done), self.run.manifest.accuracy_matrix
        if done == 0:
            return
        # Later tasks, as far as they have scores (eval.tasks: all), do not count yet.
        if done < len(self.run.manifest.tasks):
            yield f"Metrics so far, as if the stream ended with {markdown_text(self.run.done[-1])}:"
        values = metrics.all_metrics([row[:done] for row in matrix])
        del values["forward_transfer_single"]  # needs the scores of models trained on a single task, from other runs
        if notes := self.run.manifest.notes:
            yield "\n".join(f"- {note[0].upper()}{note[1:]}." for note in notes)
        lines = ([markdown_code(name), _score(value), definition(name)] for name, value in values.items())
        header = ["metric", "value", "definition (T tasks, score a[i][j] on task j after task i)"]
        yield markdown(header, lines, text=(0, 2))

    def _general(self) -> Iterator[str]:
        """General ability, as scored by lm-evaluation-harness."""
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
            lines = zip(self.run.done, map(timing, self.run.manifest.timings), strict=False)
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
        yield f"The {min(TOP_UNITS, len(table.names))} most important units of each task, with their importance:"
        yield markdown(["task", "units"], _top_units(self.run.done, self.units), text=(0, 1))
        yield from self._pictures("task_correlation.png", "fusion.png")

    def _pictures(self, *names: str) -> Iterator[str]:
        """The pictures that exist, with their captions."""
        for name in names:
            if name in self.files:
                yield f"![{name.removesuffix('.png').replace('_', ' ')}]({name})"
                yield CAPTIONS[name]


def settings_of(settings: Mapping[str, Any]) -> list[list[str]]:
    """Name and value of the methods and of each of `SETTINGS` that a recipe has."""
    return list(_settings(settings))


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


def _scored_by(names: Mapping[str, str]) -> str:
    """`exact_match`, or each metric with its tasks if they differ."""
    by_name: dict[str, list[str]] = {}
    for task, name in names.items():
        by_name.setdefault(name, []).append(task)
    if len(by_name) == 1:
        return next(iter(by_name))
    return "; ".join(f"{name}: {', '.join(tasks)}" for name, tasks in by_name.items())


def definition(name: str) -> str:
    """The first paragraph of the docstring of a metric's function, on one line; empty if there is none."""
    return (inspect.getdoc(getattr(metrics, name, None)) or "").partition("\n\n")[0].replace("\n", " ")


def timing(entry: Mapping[str, float]) -> list[str]:
    """Steps, seconds of training, tokens per second and seconds of evaluation of a task; a dash if unknown."""
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
