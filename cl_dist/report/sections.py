"""The sections of a run's HTML page. `SECTIONS` lists them: a section is one function and one entry there."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cl_dist.config.words import listed
from cl_dist.evaluation import metrics
from cl_dist.methods.catalogue import config_class
from cl_dist.progress import WIDEST_MATRIX, own_and_last, score_names
from cl_dist.report.blocks import Block, Cell, Code, Details, Fact, Facts, Figure, Page, Section, Table, Text, number
from cl_dist.report.blocks import change as difference
from cl_dist.report.columns import without_common_start
from cl_dist.report.flips import Flips
from cl_dist.report.kept_rows import CAPTIONS as KEPT_CAPTIONS
from cl_dist.report.kept_rows import KeptRows
from cl_dist.report.page import CAPTIONS, MIB, TOP_UNITS, definition, settings_of, timing
from cl_dist.report.reading import RunData
from cl_dist.report.tables import COUNTED, general_names, scoring_lines
from cl_dist.report.units import UnitResults, correlation
from cl_dist.state.stored_files import read_stored_text

Matrix = Sequence[Sequence[float | None]]

MOST_SHOWN = 12
"""More tasks than this are listed on demand only; those that lost most stay in sight."""
MOST_LETTERS = 300
"""Of an answer that is shown as an example."""
WORST = 8
"""Tasks in sight if there are more."""
LONG_NAMES = 11
"""More columns than this have upright headings."""

HEADLINES = {
    "forgetting": ("Forgetting", "F, Chaudhry et al. 2018: largest earlier score minus the last one"),
    "average_performance": ("Average performance", "AP: mean of the last scores"),
    "backward_transfer": ("Backward transfer", "BWT, GEM: last score minus the one right after training"),
    "forward_transfer_zero_shot": ("Forward transfer", "FWT, GEM: gain on a task before it is trained"),
    "learning_accuracy": ("Learning accuracy", "LA: mean of the scores right after training"),
}
"""The metrics in the summary: name and variant. The section on metrics has their formulas."""


@dataclass(frozen=True)
class Contents:
    """What a page is made of."""

    run: RunData
    units: UnitResults | None
    flips: Sequence[Flips]
    """How the samples of tasks changed between their own training and now."""
    not_compared: Mapping[str, str]
    """Why the samples of other finished tasks cannot be compared, by task."""
    kept: KeptRows | None
    """Which rows were kept."""
    files: Collection[str]
    """Names of the files beside the page."""
    missing: Sequence[str]
    """What is not shown, and why."""

    @property
    def tasks(self) -> tuple[str, ...]:
        """All tasks of the stream."""
        return self.run.manifest.tasks

    @property
    def matrix(self) -> Matrix:
        """The rows of scores so far."""
        return self.run.manifest.accuracy_matrix


def run_page(contents: Contents) -> Page:
    """The page of one run."""
    run = contents.run
    sections = (build(contents) for build in SECTIONS)
    methods = ", ".join(method_names(run)) or "unknown method"
    done = (
        f"{len(run.done)} of {len(contents.tasks)} tasks"
        if len(run.done) < len(contents.tasks)
        else (f"{len(contents.tasks)} tasks" if len(contents.tasks) > 1 else "1 task")
    )
    return Page(
        title=run.folder.path.resolve().name,
        subtitle=" · ".join([methods, done, run.manifest.status]),
        sections=[section for section in sections if section is not None],
        files={name: name for name in contents.files},
    )


def method_names(run: RunData) -> list[str]:
    """The methods of a run by name; empty without a recipe."""
    methods = run.settings.get("method")
    return [str(each.get("name")) for each in methods if isinstance(each, dict)] if isinstance(methods, list) else []


def metrics_so_far(run: RunData) -> dict[str, float | None]:
    """All metrics over the finished tasks; None for those that mean nothing for the run's methods. Empty without a
    finished task.
    """
    done = len(run.done)
    if not done:
        return {}
    values = metrics.all_metrics([row[:done] for row in run.manifest.accuracy_matrix])
    del values["forward_transfer_single"]  # needs the scores of models trained on a single task, from other runs
    return values | dict.fromkeys(meaningless(run) & values.keys())


def kinds(run: RunData) -> dict[str, str]:
    """The kind of each task's score, such as `exact_match`; tasks of which it is unknown are left out."""
    return score_names(run.manifest.scoring_by_task()) or run.log.metrics


def kinds_in_means(run: RunData) -> list[str]:
    """The kinds of scores that the metrics so far are means of."""
    known = kinds(run)
    return list(dict.fromkeys(known[task] for task in run.done if task in known))


def performance_by_kind(run: RunData) -> dict[str, float | None]:
    """AP over the tasks of each kind of score, if there are several kinds; otherwise empty."""
    done = len(run.done)
    if len(kinds_in_means(run)) < 2:
        return {}
    return metrics.average_performance_by_metric(
        [row[:done] for row in run.manifest.accuracy_matrix], run.done, kinds(run)
    )


def meaningless(run: RunData) -> set[str]:
    """The metrics that mean nothing for the run's methods."""
    classes = [config_class(name) for name in method_names(run)]
    return {name for each in classes if each is not None for name in each.MEANINGLESS}


def summary(contents: Contents) -> Section:
    """How much was forgotten: a sentence, the metrics, and each task's score then and now."""
    run, values = contents.run, metrics_so_far(contents.run)
    blocks: list[Block] = []
    if values:
        by_kind = performance_by_kind(run)
        careful = "; here of different scores" if by_kind else ""
        facts = [Fact(name, number(values[key], 3), f"{note}{careful}") for key, (name, note) in HEADLINES.items()]
        blocks.append(Facts(facts))
        if by_kind:
            means = ", ".join(f"{kind} {number(value, 3)}" for kind, value in by_kind.items())
            blocks.append(
                Text(
                    "The tasks are scored in different ways, so the numbers above are means of unlike things: look at "
                    f"each task instead. Average performance by kind of score: {means}."
                )
            )
        if len(run.done) < len(contents.tasks):
            blocks.append(
                Text(
                    f"So far, as if the stream ended with {run.done[-1]}. Not finished yet: "
                    f"{listed(contents.tasks[len(run.done) :], MOST_SHOWN)}."
                )
            )
        blocks += _then_and_now(contents)
    notes = run.manifest.notes
    blocks.append(Text(items=[f"{note[0].upper()}{note[1:]}." for note in notes]))
    return Section("summary", headline(len(run.done), values, len(kinds_in_means(run)) > 1), blocks)


def headline(done: int, values: Mapping[str, float | None], mixed: bool = False) -> str:
    """The answer to the question how much was forgotten, in a sentence; `mixed` if it is a mean of different scores."""
    if not done:
        return "No task is finished yet"
    if done == 1:
        return "One task is finished, so there is nothing to forget yet"
    earlier = "the first task" if done == 2 else f"the first {done - 1} tasks"
    moved = values.get("backward_transfer")
    if moved is None or math.isnan(moved):
        return f"How much of {earlier} was forgotten is unknown: scores are missing or mean nothing here"
    average = "" if done == 2 else " on average over different scores" if mixed else " on average"
    if abs(moved) < 0.0005:
        return f"Nothing forgotten: scores on {earlier} are what they were right after their training"
    size = f"{'fell' if moved < 0 else 'rose'} by {number(abs(moved), 3)}{average}"
    return f"Scores on {earlier} {size} after their training"


def forgot_least(forgotten: Mapping[str, float]) -> str:
    """Who forgot least, in a sentence; those that are equal but for rounding tie.

    Args:
        forgotten: Forgetting by name; at least one.
    """
    least = min(forgotten.values())
    best = [name for name, value in forgotten.items() if math.isclose(value, least, rel_tol=1e-9, abs_tol=1e-9)]
    if len(best) == 1:
        return f"{best[0]} forgot least"
    how = "equally little" if len(best) == len(forgotten) else "least, and equally little"
    return f"{listed(best, last='and')} tie: they forgot {how}"


def _then_and_now(contents: Contents) -> Iterator[Block]:
    """Each finished task's score right after its training, and now."""
    done = len(contents.run.done)
    ends = scales(contents)
    rows: list[tuple[float | None, list[str | Cell]]] = []
    for (name, own, last), (low, high) in list(zip(own_and_last(contents.tasks, contents.matrix), ends, strict=True))[
        :done
    ]:
        known = None not in (own, last)
        moved = last - own if own is not None and last is not None else None
        cell = difference(moved)
        places = (
            ((own - low) / (high - low), (last - low) / (high - low)) if own is not None and last is not None else None
        )
        drawn = Cell("", span=places, tone=cell.tone) if known and not math.isnan(moved or 0.0) else "–"
        rows.append((moved, [name, number(own), number(last), cell, drawn]))
    header = ["task", "after training", "now", "change", f"○ then, ● now ({_range_in_words(ends[:done])})"]
    everything = Table(
        "Each task's score right after its training and now", header, [row for _, row in rows], words=(4,)
    )
    if done <= MOST_SHOWN:
        yield everything
        return
    worst = sorted((row for row in rows if row[0] is not None and row[0] < 0), key=lambda row: row[0] or 0.0)[:WORST]
    if worst:
        yield Table(f"The {len(worst)} tasks that lost most", header, [row for _, row in worst], words=(4,))
    yield Details(f"All {done} tasks", [everything])


def scales(contents: Contents) -> list[tuple[float, float]]:
    """The scale of each task: that of all tasks with its kind of score."""
    known = kinds(contents.run)
    groups = [known.get(task, "") for task in contents.tasks]
    columns = {
        kind: [[score for score, group in zip(row, groups, strict=True) if group == kind] for row in contents.matrix]
        for kind in dict.fromkeys(groups)
    }
    ends = {kind: scale(scores) for kind, scores in columns.items()}
    return [ends[kind] for kind in groups]


def _range_in_words(ends: Sequence[tuple[float, float]]) -> str:
    return f"{ends[0][0]:g} to {ends[0][1]:g}" if len(set(ends)) == 1 else "a scale for each kind of score"


def scale(matrix: Matrix) -> tuple[float, float]:
    """From 0 to 1 for shares such as accuracies, otherwise from the worst to the best score."""
    known = [score for row in matrix for score in row if score is not None and math.isfinite(score)]
    low, high = min(known, default=0.0), max(known, default=1.0)
    return (0.0, 1.0) if low >= 0 and high <= 1 else (low, high if high > low else low + 1.0)


def accuracy_matrix(contents: Contents) -> Section | None:
    """The accuracy matrix as a table with coloured cells; for a long stream as a picture."""
    if not contents.matrix:
        return None
    if len(contents.tasks) > WIDEST_MATRIX:
        where = "accuracy_matrix.csv has the numbers."
        return Section(
            "matrix",
            "Accuracy matrix",
            [
                Figure(
                    "accuracy_matrix",
                    f"{CAPTIONS['accuracy_matrix.png']} {where}",
                    f"Heat map of the scores on {len(contents.tasks)} tasks after each task. {where}",
                ),
            ],
        )
    ends = scales(contents)
    rows: list[list[str | Cell]] = [
        [label, *(heat_cell(score, *ends[task], own=place == task) for task, score in enumerate(row))]
        for place, (label, row) in enumerate(zip(after_each(contents.tasks), contents.matrix, strict=False), start=-1)
    ]
    caption = "Rows: the model after each task. Columns: the task that it is scored on. Framed: the task just trained."
    table = Table(caption, ["model", *contents.tasks], rows, upright=len(contents.tasks) > LONG_NAMES)
    return Section("matrix", "Accuracy matrix", [table])


def after_each(tasks: Sequence[str]) -> list[str]:
    """Labels of the matrix's rows."""
    return ["untouched", *(f"after {name}" for name in tasks)]


def heat_cell(value: float | None, low: float, high: float, *, own: bool = False, digits: int = 3) -> Cell:
    """A number with its colour; a dash without a colour if it is missing."""
    if value is None or not math.isfinite(value):
        return Cell("–", own=own)
    return Cell(number(value, digits), heat=min(1.0, max(0.0, (value - low) / (high - low))), own=own)


def over_the_stream(contents: Contents) -> Section | None:
    """Each task's score over the stream."""
    if len(contents.matrix) < 2:
        return None
    alt = f"Lines: the scores on {len(contents.tasks)} tasks after each of {len(contents.run.done)} tasks."
    figure = Figure("scores", CAPTIONS["scores.png"], f"{alt} The accuracy matrix has the numbers.")
    return Section("stream", "Scores over the stream", [figure])


def all_metrics(contents: Contents) -> Section | None:
    """Every variant of every metric, with its definition."""
    values = metrics_so_far(contents.run)
    if not values:
        return None
    rows = [[name, number(value), definition(name).replace("`", "")] for name, value in values.items()]
    by_kind = performance_by_kind(contents.run)
    rows[1:1] = [
        [f"average_performance ({kind})", number(value), f"AP of the tasks scored by {kind}"]
        for kind, value in by_kind.items()
    ]
    if by_kind:
        rows[0][2] += " Here the mean of different scores."
    caption = "T tasks; a[i][j] is the score on task j after training on task i, a[-1] the untouched model's"
    blocks: list[Block] = [Table(caption, ["metric", "value", "definition"], rows, words=(2,))]
    if none := meaningless(contents.run) & values.keys():
        methods = ", ".join(method_names(contents.run))
        blocks.append(Text(f"Left out because they mean nothing for {methods}: {', '.join(sorted(none))}."))
    return Section("metrics", "Metrics", blocks)


def changed_samples(contents: Contents) -> Section | None:
    """Samples that went from right to wrong and from wrong to right."""
    flips, reasons = contents.flips, contents.not_compared
    if not flips:
        return None
    rows: list[list[str | Cell]] = [
        [
            each.task,
            str(each.samples),
            Cell(str(each.right_to_wrong), tone="bad" if each.right_to_wrong else ""),
            Cell(str(each.wrong_to_right), tone="good" if each.wrong_to_right else ""),
            str(each.still_right),
            str(each.still_wrong),
            number(each.forgotten, 3),
            number(each.gained, 3),
        ]
        for each in flips
    ]
    header = ["task", "samples", "right → wrong", "wrong → right", "still right", "still wrong", "forgotten", "gained"]
    caption = "Samples of each task, right after its training and now"
    blocks: list[Block] = [
        folded(Table(caption, header, rows), len(rows)),
        Text(
            "Forgotten and gained are shares of the samples, adjusted for chance: an answer that was guessed right "
            "once is likely to be wrong the next time. They are estimates, and may come out a little below 0."
        ),
    ]
    if shown := [line for each in flips for line in _examples(each)]:
        table = Table(
            "The first samples that changed",
            ["task", "sample", "change", "right answer", "then", "now"],
            shown,
            words=(2, 3, 4, 5),
        )
        blocks.append(Details(f"Examples ({len(shown)})", [table]))
    if reasons:
        items = [f"{task}: {reason}." for task, reason in reasons.items()]
        blocks.append(Details(f"Tasks that cannot be compared ({len(items)})", [Text(items=items)]))
    return Section("samples", "Samples that changed", blocks)


def _examples(flips: Flips) -> Iterator[list[str]]:
    for what, examples in (("right → wrong", flips.lost), ("wrong → right", flips.found)):
        for each in examples:
            texts = (text if len(text) <= MOST_LETTERS else f"{text[:MOST_LETTERS]}…" for text in each[1:])
            yield [flips.task, str(each.sample), what, *texts]


def kept_rows(contents: Contents) -> Section | None:
    """Kept rows: by layer, their stability, and the overlap of tasks."""
    kept = contents.kept
    if kept is None or not any(kept.masked):
        return None
    masked = [task for task, is_masked in enumerate(kept.masked) if is_masked]
    blocks: list[Block] = [
        Figure(
            "kept_rows",
            KEPT_CAPTIONS["kept_rows.png"],
            f"Heat maps: kept rows and their stability in {len(kept.layers)} layers for {len(masked)} tasks. "
            "kept_rows.csv has the numbers.",
        ),
        folded(_kept_shares(kept, masked), len(masked)),
    ]
    if len(masked) > WIDEST_MATRIX:
        blocks.append(
            Figure(
                "row_overlap",
                KEPT_CAPTIONS["row_overlap.png"],
                "Heat map: overlap of the kept rows of each pair of tasks. row_overlap.csv has the numbers.",
            )
        )
    elif len(masked) > 1:
        blocks += [_overlap(kept, masked), Text(KEPT_CAPTIONS["row_overlap.png"])]
    return Section("kept-rows", "Kept rows", blocks)


def _kept_shares(kept: KeptRows, masked: Sequence[int]) -> Table:
    """How many rows each of the masked tasks kept, and how stable they were."""
    rows = [
        [
            kept.tasks[task],
            str(kept.recorded[task][1]),
            *(_weighted(values[task], kept.rows) for values in (kept.kept, kept.ever, kept.mostly)),
            number(float(kept.overlap[task, task]), 3),
        ]
        for task in masked
    ]
    return Table(
        "Shares of all rows, and how stable the kept ones are within the task (0: as by chance, 1: always the same)",
        ["task", "steps", "kept in a step", "kept at least once", "kept in 9 steps of 10", "stability"],
        rows,
    )


def _overlap(kept: KeptRows, masked: Sequence[int]) -> Table:
    """The overlap of each pair of masked tasks."""
    names = [kept.tasks[task] for task in masked]
    rows: list[list[str | Cell]] = [
        [
            name,
            *(heat_cell(float(kept.overlap[row, column]), 0.0, 1.0, own=row == column, digits=2) for column in masked),
        ]
        for name, row in zip(names, masked, strict=True)
    ]
    return Table(
        "Overlap of the kept rows of two tasks (0: as by chance, 1: the same)",
        ["task", *names],
        rows,
        upright=len(names) > LONG_NAMES,
    )


def _weighted(shares: np.ndarray, rows: np.ndarray) -> str:
    """Mean over the layers that have a value, weighted by their rows."""
    known = ~np.isnan(shares)
    return number(float(np.average(shares[known], weights=rows[known])), 3) if known.any() else "–"


def scoring(contents: Contents) -> Section | None:
    """How each task was scored."""
    header, rows = scoring_lines(contents.tasks, contents.run.manifest.scoring)
    if not rows:  # a release that recorded only the metric, in the log
        header, rows = ["task", "metric"], [[name, metric] for name, metric in contents.run.log.metrics.items()]
    if not rows:
        return None
    words = [place for place, name in enumerate(header) if name not in COUNTED]
    table = Table("How each task was last scored", header, rows, words=words)
    return Section("scoring", "How the tasks were scored", [folded(table, len(rows))])


def folded(table: Table, rows: int) -> Block:
    """The table, or something to open if it is long."""
    return table if rows <= WIDEST_MATRIX else Details(f"{table.caption} ({rows})", [table])


def general_ability(contents: Contents) -> Section | None:
    """General ability, as scored by lm-evaluation-harness."""
    measured = contents.run.manifest.general
    if not measured:
        return None
    names = general_names(measured)
    rows = [
        [entry["after"], *(number(entry["scores"].get(name, {}).get("score")) for name in names)] for entry in measured
    ]
    blocks: list[Block] = [folded(Table("Scores by lm-evaluation-harness", ["after", *names], rows), len(rows))]
    if tasks := contents.run.done:
        found = {each.__name__: each(measured, tasks) for each in (metrics.general_ability, metrics.general_forgetting)}
        lines = [[name, number(value), definition(name)] for name, value in found.items()]
        blocks.append(Table("Metrics of general ability", ["metric", "value", "definition"], lines, words=(2,)))
    return Section("general", "General ability", blocks)


def training(contents: Contents) -> Section | None:
    """Loss, throughput, restarts, memory and device."""
    run, manifest = contents.run, contents.run.manifest
    blocks: list[Block] = []
    if run.log.losses:
        steps = sum(map(len, run.log.losses.values()))
        blocks.append(Figure("loss", CAPTIONS["loss.png"], f"Line: the training loss over {steps} optimiser steps."))
    layouts = manifest.segments or (manifest,)
    ranks = "; then ".join(f"{layout.world_size}, ZeRO stage {layout.zero_stage}" for layout in layouts)
    facts = [["ranks", ranks], ["restarts", str(manifest.restarts)]]
    facts += [_device_fact(name, value) for name, value in (manifest.device or {}).items()]
    tokens, seconds = (sum(entry.get(key, 0) for entry in manifest.timings) for key in ("tokens", "train_seconds"))
    if tokens and seconds:
        facts.append(["tokens per second, all ranks", f"{tokens / seconds:.0f}"])
    blocks.append(Table("The run", ["fact", "value"], facts, words=(1,)))
    if run.done:
        header = ["task", "steps", "training, s", "tokens per second", "evaluation, s"]
        rows = [[name, *timing(entry)] for name, entry in zip(run.done, manifest.timings, strict=False)]
        blocks.append(folded(Table("Time and throughput of each task", header, rows), len(rows)))
    if peaks := manifest.peak_memory_bytes:
        rows = [[f"rank {rank}", f"{peak / MIB:.0f}"] for rank, peak in enumerate(peaks)]
        blocks.append(folded(Table("Peak memory", ["rank", "MiB"], rows), len(rows)))
    return Section("training", "Training", blocks)


def _device_fact(name: str, value: object) -> list[str]:
    if name == "memory_bytes" and isinstance(value, int):
        return ["device: memory", f"{value / 2**30:.1f} GiB"]
    return [f"device: {name}", {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)]


def skill_units(contents: Contents) -> Section | None:
    """KIF's and TaSL's skill units: their importance, what tasks have in common, and fusion."""
    units, tasks = contents.units, contents.run.done
    if units is None:
        return None
    table = units.table
    size = f"{len(table.names)} units in {len(table.modules)} modules, {int(table.elements.sum())} trained elements."
    names = without_common_start(table.names)
    best = [[name, top_units(scores, names)] for name, scores in zip(tasks, units.importance, strict=True)]
    caption = f"The {min(TOP_UNITS, len(table.names))} most important units of each task, with their importance"
    blocks: list[Block] = [
        Text(size),
        Figure(
            "unit_importance",
            _plain_caption("unit_importance.png"),
            f"Heat map: importance of the units to {len(tasks)} tasks. unit_importance.csv has the numbers.",
        ),
        Details(
            caption, [Table(f"{caption}; {_left_out(table.names[0], names[0])}", ["task", "units"], best, words=(1,))]
        ),
    ]
    if len(tasks) > 1:
        blocks += _between_tasks(tasks, units)
        blocks.append(
            Figure(
                "fusion",
                _plain_caption("fusion.png"),
                "Heat map: the share of new weights in each module after each fusion. fusion.csv has the numbers.",
            )
        )
    return Section("units", "Skill units and fusion", blocks)


def top_units(scores: np.ndarray, names: Sequence[str]) -> str:
    """The most important units of a task, best first."""
    known = np.flatnonzero(~np.isnan(scores))
    if not len(known):
        return "unknown: no score is a number"
    if scores[known].min() == scores[known].max():
        return "all the same"
    best = known[np.argsort(-scores[known], kind="stable")[:TOP_UNITS]]
    return ", ".join(f"{names[unit]} {scores[unit]:.3g}" for unit in best)


def _left_out(name: str, shown: str) -> str:
    return f"all names start with {name.removesuffix(shown)}" if shown != name else "names in full"


def _between_tasks(tasks: Sequence[str], units: UnitResults) -> Iterator[Block]:
    values = correlation(units.importance)
    yield Figure(
        "task_correlation",
        _plain_caption("task_correlation.png"),
        f"Heat map: correlation of the unit scores of {len(tasks)} tasks.",
    )
    if len(tasks) <= WIDEST_MATRIX:
        rows = [[name, *(number(value, 2) for value in row)] for name, row in zip(tasks, values.tolist(), strict=True)]
        upright = len(tasks) > LONG_NAMES
        yield Details(
            "The correlations as a table",
            [Table("Pearson correlation of unit scores", ["task", *tasks], rows, upright=upright)],
        )


def _plain_caption(name: str) -> str:
    """A caption of the Markdown page without its links."""
    text = CAPTIONS[name]
    for file in ("unit_importance.csv", "task_correlation.csv", "fusion.csv"):
        text = text.replace(f"[{file}]({file})", file)
    return text


def recipe(contents: Contents) -> Section | None:
    """The most important settings, and the whole recipe."""
    run = contents.run
    if not run.settings:
        return None
    text = read_stored_text(run.folder.config)
    return Section(
        "recipe",
        "Recipe",
        [
            Table("The most important settings", ["setting", "value"], settings_of(run.settings), words=(1,)),
            Details("Every setting (config.yaml)", [Code("config.yaml", text)]),
        ],
    )


def missing(contents: Contents) -> Section | None:
    """What is not on the page, and why."""
    if not contents.missing:
        return None
    return Section("missing", "What is missing", [Text(items=contents.missing)])


SECTIONS: tuple[Callable[[Contents], Section | None], ...] = (
    summary,
    accuracy_matrix,
    over_the_stream,
    changed_samples,
    all_metrics,
    scoring,
    general_ability,
    kept_rows,
    skill_units,
    training,
    recipe,
    missing,
)
"""The sections of a page from top to bottom; one that has nothing to show returns None."""
