"""Samples that went from right to wrong and from wrong to right: each task just after its training, and now.

A score that stays the same may hide that as many samples were forgotten as were learnt. Not every change is either,
though: an answer that was guessed right once is likely to be wrong the next time. The adjusted shares therefore assume
that a model knows a sample or guesses, and that a guess is right with probability g, which follows from how often the
model gives each answer and how often each is right (the agreement by chance in Cohen's kappa):

    g = sum over answers x of P(the model answers x) P(x is right)

A model that always gives the same answer knows nothing, whatever its accuracy. With the observed shares rw (right, then
wrong), wr and ww, and g for the model after the task (g1) and now (g2), the share of samples that neither knows is

    u = ww / ((1 - g1) (1 - g2)),

those that were known and are not any more `forgotten = rw / (1 - g2) - u g1`, and those known only now
`gained = wr / (1 - g1) - u g2`. Their difference is that of the two accuracies corrected for guessing,
`(accuracy - g) / (1 - g)`. Both are estimates, and may come out a little below 0. They count two guesses at the same
sample as independent, which is exact for labels of equal frequency.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from cl_dist.errors import BadInput
from cl_dist.report.reading import RunData
from cl_dist.report.tables import csv_text

RIGHT_OR_WRONG = ("exact_match", "macro_f1", "jga")
"""Metrics whose samples are either right (1) or wrong (0); those of `jga` are slots."""
GRADED = {"rouge_l": "ROUGE-L grades answers, it calls none right or wrong", "log_likelihood": "text has no answers"}
"""Why the samples of other metrics cannot change sides."""
MOST_EXAMPLES = 3
"""Examples of each kind that are kept for a task."""


class Example(NamedTuple):
    """A sample that changed sides."""

    sample: int
    """Position in the task's evaluation split."""
    reference: str
    """The right answer; the one closest to what the model said after the task, if there are several."""
    before: str
    """The model's answer just after the task's training."""
    now: str


@dataclass(frozen=True)
class Flips:
    """How the samples of a task changed between its own training and now."""

    task: str
    samples: int
    right_to_wrong: int
    wrong_to_right: int
    still_right: int
    still_wrong: int
    forgotten: float
    """Share of the samples that were known and are not any more, adjusted for guessing; NaN if guesses explain all."""
    gained: float
    """Share of the samples that are known only now, adjusted for guessing."""
    lost: tuple[Example, ...]
    """The first samples that went from right to wrong."""
    found: tuple[Example, ...]
    """The first samples that went from wrong to right."""


def read_flips(run: RunData) -> tuple[list[Flips], dict[str, str]]:
    """The finished tasks whose samples can be compared; and for every other finished task, why it cannot.

    Raises:
        BadInput: A file of predictions is damaged.
    """
    flips, reasons = [], {}
    last = run.folder.task(len(run.done) - 1, run.done[-1]).predictions if run.done else None
    same = _normaliser(run.settings)
    for position, task in enumerate(run.done):
        own = run.folder.task(position, task).predictions
        metric = str(run.manifest.scoring.get(task, {}).get("metric", run.log.metrics.get(task)))
        if metric not in RIGHT_OR_WRONG:
            reasons[task] = GRADED.get(metric, "its metric is not recorded")
        elif last is None or own == last:
            reasons[task] = "no task was trained after it"
        elif missing := [path for path in (own, last) if not (path / f"{task}.jsonl").is_file()]:
            reasons[task] = f"{(missing[0] / task).relative_to(run.folder.path)}.jsonl is missing"
        else:
            before, now = _read(own / f"{task}.jsonl"), _read(last / f"{task}.jsonl")
            if before.keys() != now.keys():
                reasons[task] = "it was scored on other samples then"
            else:
                flips.append(_flips(task, before, now, same))
    return flips, reasons


def _normaliser(settings: Mapping[str, Any]) -> Callable[[str], str]:
    """What counts as the same answer, as in scoring."""
    from cl_dist.evaluation.scores import NORMALISERS  # imports packages that no other command of the report needs

    evaluation = settings.get("eval")
    name = evaluation.get("normalise") if isinstance(evaluation, dict) else None
    return NORMALISERS.get(str(name), NORMALISERS["none"])


@dataclass(frozen=True)
class _Answer:
    text: str
    reference: str
    right: bool


def _read(path: Path) -> dict[int, _Answer]:
    """The answers in a file of predictions, by sample."""
    answers = {}
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                index, answer = _answer(line, f"{path} is damaged: line {number}")
                answers[index] = answer
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}") from error
    if not answers:
        raise BadInput(f"{path} is damaged: it has no predictions")
    return answers


def _answer(line: bytes, place: str) -> tuple[int, _Answer]:
    try:
        record = json.loads(line)
        answer = _Answer(str(record["prediction"]), str(record["reference"]), float(record["score"]) == 1.0)
        return int(record["index"]), answer
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise BadInput(f"{place} is not a JSON object with index, prediction, reference and score") from error


def _flips(task: str, before: Mapping[int, _Answer], now: Mapping[int, _Answer], same: Callable[[str], str]) -> Flips:
    sides: dict[tuple[bool, bool], list[int]] = {(a, b): [] for a in (False, True) for b in (False, True)}
    for index, answer in before.items():
        sides[answer.right, now[index].right].append(index)
    counts = {side: len(indices) for side, indices in sides.items()}
    forgotten, gained = adjusted(
        counts[True, False] / len(before),
        counts[False, True] / len(before),
        counts[False, False] / len(before),
        guess_rate([(each.text, each.reference) for each in before.values()], same),
        guess_rate([(each.text, each.reference) for each in now.values()], same),
    )

    def examples(indices: Sequence[int]) -> tuple[Example, ...]:
        first = sorted(indices)[:MOST_EXAMPLES]
        return tuple(Example(each, before[each].reference, before[each].text, now[each].text) for each in first)

    return Flips(
        task=task,
        samples=len(before),
        right_to_wrong=counts[True, False],
        wrong_to_right=counts[False, True],
        still_right=counts[True, True],
        still_wrong=counts[False, False],
        forgotten=forgotten,
        gained=gained,
        lost=examples(sides[True, False]),
        found=examples(sides[False, True]),
    )


def guess_rate(pairs: Sequence[tuple[str, str]], same: Callable[[str], str]) -> float:
    """The probability that a guess is right, from (answer, right answer) pairs: the agreement by chance of kappa."""
    answers = Counter(same(answer) for answer, _ in pairs)
    references = Counter(same(reference) for _, reference in pairs)
    return sum(count * references[answer] for answer, count in answers.items()) / len(pairs) ** 2


def adjusted(
    right_wrong: float, wrong_right: float, wrong_wrong: float, guess_before: float, guess_now: float
) -> tuple[float, float]:
    """The shares forgotten and gained, from the observed shares and both guess rates; NaN if no guess is ever wrong."""
    if guess_before >= 1 or guess_now >= 1:
        return math.nan, math.nan
    unknown = wrong_wrong / ((1 - guess_before) * (1 - guess_now))
    forgotten = right_wrong / (1 - guess_now) - unknown * guess_before
    gained = wrong_right / (1 - guess_before) - unknown * guess_now
    return forgotten, gained


CSV_COLUMNS = (
    "task", "samples", "right_to_wrong", "wrong_to_right", "still_right", "still_wrong", "forgotten", "gained"
)  # fmt: skip


def flips_csv(flips: Iterable[Flips]) -> str:
    """A line per task; `forgotten` and `gained` are empty where they are undefined."""

    def lines() -> Iterator[list[str | int | float]]:
        for each in flips:
            values = [getattr(each, name) for name in CSV_COLUMNS]
            yield ["" if isinstance(value, float) and math.isnan(value) else value for value in values]

    return csv_text(CSV_COLUMNS, lines())
