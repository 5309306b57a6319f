"""What a run will read and learn, task by task: counts, lengths, labels, and samples as the model gets them.

Needs a tokenizer but no weights. `cl-dist data` prints it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, islice

from cl_dist.config.objectives import FACTS
from cl_dist.errors import BadInput
from cl_dist.tasks.encode import Encoder
from cl_dist.tasks.formats.conversations import each_answer
from cl_dist.tasks.types import IGNORE, Encoded, Example, Task

SHOWN = 3
"""Samples that are shown of each task."""


@dataclass(frozen=True)
class Lengths:
    """Lengths in tokens, before anything is cut."""

    median: int
    most_up_to: int
    """95 % of the lengths are at most this."""
    longest: int


@dataclass(frozen=True)
class Piece:
    """A stretch of a sample."""

    text: str
    learnt: bool
    """Whether it takes part in the loss."""


@dataclass(frozen=True)
class Sample:
    """One training sample as the model gets it."""

    index: int
    """Its position among the task's training samples."""
    tokens: int
    targets: int
    """Tokens with a loss; 1 for a class."""
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class TaskOverview:
    """One task."""

    name: str
    kind: str
    train: int
    """Training samples. Of a plain text, documents."""
    evaluation: int
    scored_on: str
    origins: tuple[str, str]
    """Files (or data sets and splits) of the training and the evaluation samples."""
    read_as: str
    """What the records hold, and in which columns; empty for formats whose records have fixed fields."""
    repeated: int
    """Training samples that are identical to an earlier one."""
    seen: int
    """Evaluation samples that are training samples too; 0 if the task is scored on its training data."""
    labels: dict[str, int]
    """Each label and its number of training samples."""
    labels_from: str | None
    prompts: Lengths | None
    """None for plain text."""
    answers: Lengths | None
    """Of plain text, its documents. None for a classifier, whose answers are classes."""
    cut_prompts: int
    """Training samples whose prompt is cut, or whose conversation loses exchanges, to fit `train.max_length`."""
    long_answers: int
    """Training answers of more than `train.max_target_length` tokens."""
    samples: tuple[Sample, ...]
    problem: str | None
    """Why a run would stop here; None if it would not."""


def overview(task: Task, encoder: Encoder) -> TaskOverview:
    """Read all training samples of a task. Raises BadInput if the model's objective cannot learn it."""
    facts = FACTS[encoder.objective]
    problem = None
    try:
        encoder.check(task)
    except BadInput as error:
        problem = str(error)
    lengths = list(encoder.each_length(task))
    prompts = [prompt for prompt, _, _ in lengths] if task.kind != "text" else []
    answers = [length for _, each, _ in lengths for length in each] if facts.generates or task.kind == "text" else []
    counts = Counter(example.answer for example in task.train) if task.labels else Counter[str]()
    return TaskOverview(
        name=task.name,
        kind=task.kind,
        train=len(task.train),
        evaluation=len(task.evaluation),
        scored_on=task.scored_on,
        origins=task.origins,
        read_as=task.read_as,
        repeated=len(task.train) - len(set(task.train)),
        seen=0 if task.scored_on == "train" else _seen(task),
        labels={label: counts[label] for label in task.labels},
        labels_from=task.labels_from,
        prompts=_summary(prompts),
        answers=_summary(answers),
        cut_prompts=sum(cut for _, _, cut in lengths),
        long_answers=0 if task.kind == "text" else sum(length > encoder.answer_room for length in answers),
        samples=tuple(_samples(task, encoder)),
        problem=problem,
    )


def _seen(task: Task) -> int:
    learnt = {(each.prompt, each.answer) for example in task.train for each in each_answer(example)}
    return sum((each.prompt, each.answer) in learnt for each in task.evaluation)


def _summary(lengths: Sequence[int]) -> Lengths | None:
    ranked = sorted(lengths)
    if not ranked:
        return None
    last = len(ranked) - 1
    return Lengths(ranked[last // 2], ranked[-(-95 * last // 100)], ranked[-1])


def _samples(task: Task, encoder: Encoder) -> Iterator[Sample]:
    """The first, the middle and the last sample that can be encoded; of a plain text, the first ones."""
    if task.kind == "text":
        for sample in islice(encoder.each_training_sample(task), SHOWN):
            yield _shown(sample, sample.index, task.train[0], encoder)
        return
    last = len(task.train) - 1
    for index in sorted({0, last // 2, last}):
        example = task.train[index]
        try:
            (sample,) = encoder.each_training_sample(replace(task, train=[example]))
        except BadInput:  # an answer that is too long, which `check` has reported
            continue
        yield _shown(sample, index, example, encoder)


def _shown(sample: Encoded, index: int, example: Example, encoder: Encoder) -> Sample:
    facts = FACTS[encoder.objective]
    if facts.needs_labels:
        pieces = [Piece(encoder.text(sample.input_ids), False), Piece(example.answer, True)]
        return Sample(index, len(sample.input_ids), 1, tuple(pieces))
    if facts.answer_apart:
        pieces = [Piece(encoder.text(sample.input_ids), False), Piece(encoder.text(sample.labels), True)]
        return Sample(index, len(sample.input_ids) + len(sample.labels), sample.targets, tuple(pieces))
    marked = zip(sample.input_ids, sample.labels, strict=True)
    pieces = [
        Piece(encoder.text([token for token, _ in stretch]), learnt)
        for learnt, stretch in groupby(marked, key=lambda pair: pair[1] != IGNORE)
    ]
    return Sample(index, len(sample.input_ids), sample.targets, tuple(pieces))
