"""Several runs side by side: a page with their metrics, curves, scores and the settings in which they differ."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cl_dist.config.words import listed
from cl_dist.errors import BadInput
from cl_dist.report import pictures
from cl_dist.report.blocks import Block, Cell, Fact, Facts, Figure, Page, Section, Table, Text, change, number
from cl_dist.report.drawing import Picture
from cl_dist.report.page import definition, timing
from cl_dist.report.reading import RunData, read_run
from cl_dist.report.sections import HEADLINES, LONG_NAMES, folded, forgot_least, kinds, method_names, metrics_so_far

MOST_RUNS = 12
"""More curves than this cannot be told apart."""
MOST_NAMED = 12
"""Tasks that are listed in a sentence."""
LESS_IS_BETTER = {"forgetting", "forgetting_with_last", "general_forgetting"}


@dataclass(frozen=True)
class Several:
    """Runs with a short name each, which tells them apart; the others are compared with the first."""

    runs: Mapping[str, RunData]

    @property
    def tasks(self) -> list[str]:
        """The tasks of all runs, in order of first appearance."""
        return list(dict.fromkeys(name for run in self.runs.values() for name in run.manifest.tasks))


def read_several(folders: Sequence[Path]) -> Several:
    """Read the runs. Raises `BadInput` if one cannot be read, if one is given twice, or if there are too many."""
    places = [folder.resolve() for folder in folders]
    for place in places:
        if places.count(place) > 1:
            raise BadInput(f"{place} is given twice; give different run folders")
    if len(folders) > MOST_RUNS:
        raise BadInput(f"{len(folders)} runs do not fit on one page; give at most {MOST_RUNS}")
    runs = [read_run(folder) for folder in folders]
    return Several(dict(zip(labels(places), runs, strict=True)))


def labels(places: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as many as it takes to tell them apart."""
    depth = 1
    while len({place.parts[-depth:] for place in places}) < len(places):
        depth += 1
    return ["/".join(place.parts[-depth:]) for place in places]


def default_folder(folders: Sequence[Path]) -> Path:
    """`report` in the folder that all runs are in."""
    return Path(os.path.commonpath([folder.resolve().parent for folder in folders])) / "report"


def several_pictures(several: Several) -> Iterator[tuple[str, Picture]]:
    """The pictures of the page, by file name."""
    curves = {name: run.manifest.accuracy_matrix for name, run in several.runs.items()}
    if any(len(matrix) > 1 for matrix in curves.values()):
        yield "means.png", pictures.means(curves)
    losses = {name: run for name, run in several.runs.items() if run.log.losses}
    if losses:
        yield (
            "losses.png",
            pictures.losses({name: (run.manifest.tasks, run.log.losses) for name, run in losses.items()}),
        )


def several_page(several: Several, files: Sequence[str]) -> Page:
    """The page."""
    sections = (
        _summary(several),
        _metrics(several),
        Section(
            "stream",
            "Scores over the stream",
            [
                Figure(
                    "means",
                    "Mean score over the tasks trained so far, after each task.",
                    "A line for each run. The table of metrics has the last points as average performance.",
                )
            ],
        ),
        _tasks(several),
        _training(several),
        _settings(several),
    )
    return Page(
        title=" · ".join(several.runs),
        subtitle=f"{len(several.runs)} runs side by side",
        sections=[section for section in sections if section is not None],
        files={name: name for name in files},
    )


def _summary(several: Several) -> Section:
    found = {name: metrics_so_far(run) for name, run in several.runs.items()}
    known = {name: value for name, values in found.items() if (value := values.get("forgetting")) is not None}
    blocks: list[Block] = []
    if known:
        facts = [
            Fact(name, number(found[name].get("forgetting"), 3), _method_and_state(run))
            for name, run in several.runs.items()
        ]
        title = forgot_least(known)
        blocks += [
            Facts(facts, equal=True),
            Text("Forgetting: F, Chaudhry et al. 2018, the largest earlier score minus the last one."),
        ]
    else:
        title = "No run has finished two tasks yet, so nothing is known about forgetting"
    if reasons := list(_incomparable(several)):
        title = "These runs cannot be compared by their means" if known else title
        blocks.append(Text(items=reasons))
    notes = [f"{name}: {note}." for name, run in several.runs.items() for note in run.manifest.notes]
    return Section("summary", title, [*blocks, Text(items=notes)])


def _incomparable(several: Several) -> Iterator[str]:
    """Why the metrics of the runs do not compare."""
    runs = several.runs.values()
    if len({run.done for run in runs}) > 1:
        yield (
            "The runs have not finished the same tasks in the same order: their metrics are means over different "
            "tasks and do not compare."
        )
    if different := scored_differently(several):
        yield (
            f"The runs score {listed(different, MOST_NAMED)} in different ways, so neither these scores nor the means "
            "over them compare."
        )


def scored_differently(several: Several) -> list[str]:
    """The tasks that not all runs score in the same way, as far as it is known."""
    found: dict[str, set[str]] = {}
    for run in several.runs.values():
        for task, kind in kinds(run).items():
            found.setdefault(task, set()).add(kind)
    return [task for task, ways in found.items() if len(ways) > 1]


def _method_and_state(run: RunData) -> str:
    done = f"{len(run.done)} of {len(run.manifest.tasks)} tasks"
    return ", ".join([*method_names(run), done])


def _metrics(several: Several) -> Section:
    found = {name: metrics_so_far(run) for name, run in several.runs.items()}
    names = list(dict.fromkeys(metric for values in found.values() for metric in values))
    caption = "Each metric by run"
    rows: list[list[str | Cell]] = [[name, *(number(values.get(name)) for values in found.values())] for name in names]
    if not list(_incomparable(several)):
        caption += f", and in brackets its difference from {next(iter(several.runs))}"
        rows = [[name, *compared([values.get(name) for values in found.values()], name)] for name in names]
    definitions = [[name, definition(name).replace("`", "")] for name in names]
    headline = [row for row in rows if row[0] in HEADLINES]
    rest = [row for row in rows if row[0] not in HEADLINES]
    return Section(
        "metrics",
        "Metrics",
        [
            Table(caption, ["metric", *several.runs], [*headline, *rest]),
            Table("What they are", ["metric", "definition"], definitions, words=(1,)),
        ],
    )


def compared(values: Sequence[float | None], metric: str = "") -> list[str | Cell]:
    """The first value, and each other one with its difference from the first."""
    first, *others = values
    return [number(first), *(_against(value, first, metric not in LESS_IS_BETTER) for value in others)]


def _against(value: float | None, first: float | None, more_is_better: bool) -> str | Cell:
    if value is None or first is None:
        return number(value)
    moved = change(value - first, more_is_better=more_is_better)
    return Cell(f"{number(value)} ({moved.text})", tone=moved.tone)


def _tasks(several: Several) -> Section | None:
    last = [
        dict(zip(run.manifest.tasks, run.manifest.accuracy_matrix[-1], strict=True))
        if run.manifest.accuracy_matrix
        else {}
        for run in several.runs.values()
    ]
    different = set(scored_differently(several))
    rows: list[list[str | Cell]] = []
    for name in several.tasks:
        found = [scores.get(name) for scores in last]
        rows.append([name, *(map(number, found) if name in different else compared(found))])
    caption = f"Each task's latest score by run, and in brackets its difference from {next(iter(several.runs))}"
    return Section(
        "tasks",
        "Tasks",
        [folded(Table(caption, ["task", *several.runs], rows, upright=len(several.runs) > LONG_NAMES), len(rows))],
    )


def _training(several: Several) -> Section:
    rows = []
    for name, run in several.runs.items():
        manifest = run.manifest
        seconds = sum(entry.get("train_seconds", 0) for entry in manifest.timings)
        whole = {
            key: sum(entry.get(key, 0) for entry in manifest.timings)
            for key in ("steps", "train_seconds", "tokens", "evaluate_seconds")
        }
        peak = max(manifest.peak_memory_bytes, default=0) / 2**20
        rows.append(
            [
                name,
                *(timing(whole) if seconds else ["–"] * 4),
                str(manifest.world_size),
                str(manifest.restarts),
                f"{peak:.0f}" if peak else "–",
                str((manifest.device or {}).get("name", "–")),
            ]
        )
    header = [
        "run",
        "steps",
        "training, s",
        "tokens per second",
        "evaluation, s",
        "ranks",
        "restarts",
        "largest peak memory of a rank, MiB",
        "device",
    ]
    return Section(
        "training",
        "Training",
        [
            Figure("losses", "Training loss, as a moving mean over a hundredth of the steps.", "A line for each run."),
            Table("Time, throughput and memory", header, rows, words=(8,)),
        ],
    )


def _settings(several: Several) -> Section | None:
    flat = {name: dict(_flat(run.settings)) for name, run in several.runs.items()}
    keys = list(dict.fromkeys(key for settings in flat.values() for key in settings))
    different = [key for key in keys if len({settings.get(key) for settings in flat.values()}) > 1]
    rows = [[key, *(settings.get(key, "–") for settings in flat.values())] for key in different if key != "output_dir"]
    if not rows:
        return Section("settings", "Settings", [Text("All settings are the same.")])
    words = range(1, len(flat) + 1)
    return Section(
        "settings",
        "Settings",
        [folded(Table("The settings in which the runs differ", ["setting", *flat], rows, words=words), len(rows))],
    )


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _flat(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list) and any(isinstance(each, dict) for each in value):
        for place, inner in enumerate(value):
            yield from _flat(inner, f"{key}.{place}")
    else:
        yield key, str(value)
