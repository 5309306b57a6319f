"""From a recipe's stream to checked tasks. Imports no torch, so that bad data is told within seconds."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from cl_dist.config.files import expand, is_there
from cl_dist.config.schema import StreamConfig, TaskConfig
from cl_dist.errors import BadInput
from cl_dist.heartbeat import beat
from cl_dist.tasks.formats import READERS
from cl_dist.tasks.formats.files import enumerate_names, missing
from cl_dist.tasks.formats.source import RawTask, Source, Split
from cl_dist.tasks.types import Example, Kind, Task

logger = logging.getLogger(__name__)


def load_stream(stream: StreamConfig, recipe_dir: Path) -> tuple[Task, ...]:
    """Read and check all tasks, in the stream's order.

    Raises BadInput, which names the task and, where there is one, the file and the record.
    """
    if stream.root is not None:
        root = recipe_dir / expand(stream.root, "stream.root")
        if not is_there(root):
            raise BadInput(f"stream.root: {missing(root)}")
    return tuple(load_task(task, stream, recipe_dir) for task in stream.tasks)


def load_task(task: TaskConfig, stream: StreamConfig, recipe_dir: Path) -> Task:
    """Read and check one task; BadInput names it."""
    source = Source(task, stream, recipe_dir)
    beat()
    try:
        return build_task(source, READERS[task.format](source))
    except BadInput as error:
        raise BadInput(f"task {task.name!r}: {error}") from error


def build_task(source: Source, raw: RawTask) -> Task:
    """Settle kind and labels from all samples, then apply the sample limits."""
    for split in (raw.train, raw.evaluation):
        if not split.examples:
            raise BadInput(f"{split.origin} holds no samples")
    labels = settle_labels(source, raw)
    kind: Kind = raw.kind or ("classification" if labels else "generation")
    return Task(
        name=source.task.name,
        kind=kind,
        train=raw.train.examples[: source.stream.max_train_samples],
        evaluation=first_samples(raw.evaluation.examples, source.stream.max_eval_samples),
        labels=labels,
    )


def first_samples(examples: Sequence[Example], most: int | None) -> Sequence[Example]:
    """At most so many of the samples, and the rest of the turns that they are of: half a turn would be easier."""
    if most is None or most >= len(examples):
        return examples
    turns = {example.slot.turn for example in examples[:most] if example.slot is not None}
    rest = [example for example in examples[most:] if example.slot is not None and example.slot.turn in turns]
    return [*examples[:most], *rest]


def settle_labels(source: Source, raw: RawTask) -> tuple[str, ...]:
    """The task's labels: stated in the recipe or the data, else inferred; none where it is not classification.

    Raises BadInput for a set of labels that makes no sense and for an answer that is not in it.
    """
    stated = source.task.labels if source.task.labels is not None else raw.labels
    if raw.kind in ("text", "generation"):
        if source.task.labels is not None:
            raise BadInput(f"labels are stated, but the task is {raw.kind}: leave `labels` out")
        return ()
    if stated is None:
        return infer_labels(raw, source.stream.max_labels)
    check_labels(stated)
    for split in (raw.train, raw.evaluation):
        check_answers(split, stated)
    answers = {example.answer for split in (raw.train, raw.evaluation) for example in split.examples}
    if source.task.labels is not None and (unmet := set(stated) - answers):
        logger.warning("task %r: no sample has the label %s", source.task.name, enumerate_names(unmet))
    return stated


def infer_labels(raw: RawTask, most: int) -> tuple[str, ...]:
    """The distinct answers, sorted, where there are 2 to `most` of them; none where they look like free text.

    A handful of samples of a generation task has few distinct answers too: a label must stand for more than two
    samples on average.
    """
    examples = [*raw.train.examples, *raw.evaluation.examples]
    answers = {example.answer for example in examples}
    if "" in answers:  # kept by stream.empty_answers; to answer nothing is no class
        return ()
    return tuple(sorted(answers)) if 2 <= len(answers) <= min(most, (len(examples) - 1) // 2) else ()


def check_labels(labels: Sequence[str]) -> None:
    """BadInput for fewer than two labels, an empty one or one that is there twice."""
    if len(labels) < 2:
        raise BadInput(f"{len(labels)} label(s) stated; a classification task needs at least two")
    for index, label in enumerate(labels):
        if not label.strip() or label != label.strip():
            raise BadInput(f"label {index} is {label!r}; a label must not be empty, nor start or end with white space")
        if label in labels[:index]:
            raise BadInput(f"label {label!r} is stated twice")


def check_answers(split: Split, labels: Sequence[str]) -> None:
    """BadInput for the first sample whose answer is not a label."""
    allowed = frozenset(labels)
    for index, example in enumerate(split.examples):
        if example.answer not in allowed:
            raise BadInput(
                f"{split.where(index)}: answer {example.answer!r} is not one of the labels {enumerate_names(labels)}"
            )
