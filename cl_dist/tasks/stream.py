"""From a recipe's stream to checked tasks. Imports no torch, so that bad data is reported within seconds."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

from cl_dist.config.files import expand, is_there
from cl_dist.config.schema import Recipe, StreamConfig, TaskConfig, TrainConfig
from cl_dist.config.words import is_text, listed, show
from cl_dist.errors import BadInput
from cl_dist.heartbeat import beat
from cl_dist.tasks.formats.catalogue import builtin_formats
from cl_dist.tasks.formats.conversations import each_answer
from cl_dist.tasks.formats.files import enumerate_names, missing
from cl_dist.tasks.formats.format import RawTask, Source, Split
from cl_dist.tasks.types import Example, Kind, LabelSource, ScoredOn, Task, compose

logger = logging.getLogger(__name__)

DEFAULTS = TrainConfig()
"""For callers without a recipe."""


def load_stream(stream: StreamConfig, recipe_dir: Path, train: TrainConfig = DEFAULTS) -> tuple[Task, ...]:
    """Read and check all tasks, in the stream's order. Raises BadInput, which names task, file and record.

    Of `train`, the seed draws samples that are held out, and the template decides what a conversation becomes.
    """
    if stream.root is not None:
        root = recipe_dir / expand(stream.root, "stream.root")
        if not is_there(root):
            raise BadInput(f"stream.root: {missing(root)}")
    return tuple(load_task(task, stream, recipe_dir, train) for task in stream.tasks)


def load_method_data(recipe: Recipe, recipe_dir: Path) -> dict[str, Task]:
    """Read and check the data sets that a recipe's methods name (`MethodConfig.DATA`), by setting.

    Raises BadInput, which names setting, file and record.
    """
    found = {}
    for method in recipe.method:
        for setting in method.DATA:
            name = f"method.{setting}"
            task = TaskConfig(name=name, path=getattr(method, setting), labels=())
            stream = replace(recipe.stream, max_train_samples=None)
            try:
                found[setting] = replace(load_task(task, stream, recipe_dir, recipe.train), evaluation=())
            except BadInput as error:
                raise BadInput(str(error).replace(f"task {name!r}", name, 1)) from error
    return found


def load_task(task: TaskConfig, stream: StreamConfig, recipe_dir: Path, train: TrainConfig = DEFAULTS) -> Task:
    """Read and check one task. Raises BadInput, which names the task."""
    source = Source(
        name=task.name,
        format=task.format,
        recipe_dir=recipe_dir,
        path_in_recipe=task.path,
        labels=task.labels,
        root=stream.root,
        eval_split=stream.eval_split,
        empty_answers=stream.empty_answers,
        max_train_samples=stream.max_train_samples,
        max_eval_samples=stream.max_eval_samples,
        seed=train.seed,
        stream_settings=stream.shared,
    )
    beat()
    try:
        raw = task.reader.read(source)
        if task.format not in builtin_formats():
            check_answer(raw, task.format)
        return build_task(task, stream, with_each_answer(raw, chat=train.template == "chat"))
    except BadInput as error:
        # A path or a field may have a line end in its name.
        message = "".join(each if each.isprintable() else repr(each)[1:-1] for each in str(error))
        raise BadInput(f"task {task.name!r}: {message}") from error


def check_answer(raw: object, name: str) -> None:
    """Raise BadInput unless the `read` of the user's own format returned a `RawTask` whose samples are strings."""
    if not isinstance(raw, RawTask):
        raise BadInput(f"format {name}: its read returned {show(raw)} of type {type(raw).__name__}; allowed: a RawTask")
    for part, split in (("train", raw.train), ("evaluation", raw.evaluation)):
        _check_split(split, f"format {name}: its read returned a RawTask whose {part}")
    if raw.labels is not None and (isinstance(raw.labels, str) or not all(isinstance(x, str) for x in raw.labels)):
        raise BadInput(
            f"format {name}: labels: {show(raw.labels)} is not allowed; allowed: a tuple of strings, or None"
        )
    for field, value, kinds in (("kind", raw.kind, Kind), ("evaluated", raw.evaluated, ScoredOn)):
        if value is not None and value not in get_args(kinds):
            raise BadInput(f"format {name}: {field}: {show(value)} is not allowed; allowed: {listed(get_args(kinds))}")


def _check_split(split: object, place: str) -> None:
    """Raise BadInput unless everything in a split has the annotated type."""
    if not isinstance(split, Split):
        raise BadInput(f"{place} is of type {type(split).__name__}; allowed: a Split")
    lists = isinstance(split.examples, Sequence) and isinstance(split.positions, Sequence)
    if not lists or len(split.positions) != len(split.examples) or not isinstance(split.origin, str):
        raise BadInput(
            f"{place} is not usable; allowed: lists (not generators) of examples and of their positions, of the same "
            "length, and a string as the origin"
        )
    for index, example in enumerate(split.examples):
        if not isinstance(example, Example):
            raise BadInput(f"{split.where(index)}: {show(example)} is not an Example")
        references = example.references if isinstance(example.references, tuple) else (None,)
        for text in (example.prompt, example.answer, *references):
            if not isinstance(text, str) or not is_text(text):
                raise BadInput(
                    f"{split.where(index)}: {show(example)} holds a value that is not a string; allowed: strings as "
                    "prompt and answer, a tuple of strings as references"
                )


def with_each_answer(raw: RawTask, chat: bool) -> RawTask:
    """The task with its conversations as samples.

    With a chat template, a conversation is one training sample with a loss on every answer. Otherwise each of its
    answers is a sample, the turns before it being the prompt. Evaluation always asks for each answer, after the turns
    of the data.
    """
    if not any(example.turns for split in (raw.train, raw.evaluation) for example in split.examples):
        return raw
    evaluation = _each_answer(raw.evaluation)
    if chat:
        return replace(raw, evaluation=evaluation)
    bare = (_bare(_each_answer(raw.train)), _bare(evaluation))
    return replace(raw, train=bare[0], evaluation=bare[1])


def _each_answer(split: Split) -> Split:
    found = [
        (each, position)
        for example, position in zip(split.examples, split.positions, strict=True)
        for each in each_answer(example)
    ]
    return replace(split, examples=[each for each, _ in found], positions=[position for _, position in found])


def _bare(split: Split) -> Split:
    return replace(split, examples=[replace(each, turns=()) for each in split.examples])


def build_task(task: TaskConfig, stream: StreamConfig, raw: RawTask) -> Task:
    """Determine kind and labels from all samples, then apply the sample limits."""
    for split in (raw.train, raw.evaluation):
        if not split.examples:
            raise BadInput(f"{split.origin} holds no samples")
    labels, labels_from = settle_labels(task, stream.max_labels, raw)
    kind: Kind = "classification" if labels else raw.kind if raw.kind == "text" else "generation"
    train: Sequence[Example] = raw.train.examples
    evaluation: Sequence[Example] = raw.evaluation.examples
    if labels:
        train, evaluation = [_composed(each) for each in train], [_composed(each) for each in evaluation]
    evaluation = first_samples(evaluation, stream.max_eval_samples)
    return Task(
        name=task.name,
        kind=kind,
        train=train[: stream.max_train_samples],
        evaluation=evaluation,
        labels=labels,
        labels_from=labels_from,
        unlisted=sum(each.answer not in labels for each in evaluation) if labels else 0,
        origins=(raw.train.origin, raw.evaluation.origin),
        scored_on=raw.scored_on or stream.eval_split,
        read_as=raw.read_as,
    )


def first_samples(examples: Sequence[Example], most: int | None) -> Sequence[Example]:
    """The first `most` samples, and the rest of the last turn among them: scoring half a turn would be easier."""
    if most is None or most >= len(examples):
        return examples
    turns = {example.slot.turn for example in examples[:most] if example.slot is not None}
    rest = [example for example in examples[most:] if example.slot is not None and example.slot.turn in turns]
    return [*examples[:most], *rest]


def settle_labels(task: TaskConfig, most: int, raw: RawTask) -> tuple[tuple[str, ...], LabelSource | None]:
    """The task's labels and where they come from: the recipe, the data or the training answers.

    A task that is not classification has none. `most` is stream.max_labels. Raises BadInput for labels that make no
    sense, and for an answer that is not one of them.
    """
    stated = task.labels if task.labels is not None else raw.labels
    if raw.kind in ("text", "generation"):
        if task.labels:
            raise BadInput(f"labels are stated, but the task is {raw.kind}: leave `labels` out")
        return (), None
    if task.labels == ():
        return (), None
    if stated is None:
        found = infer_labels(raw.train.examples, most)
        if not found:
            warn_of_few_answers(task.name, most, raw.train.examples)
        return found, "training answers" if found else None
    labels = tuple(compose(label) for label in stated)
    check_labels(labels)
    for split in (raw.train, raw.evaluation):
        check_answers(split, labels)
    answers = {compose(example.answer) for split in (raw.train, raw.evaluation) for example in split.examples}
    if task.labels is not None and (unmet := [label for label in labels if label not in answers]):
        logger.warning("task %r: no sample has the label %s", task.name, enumerate_names(unmet))
    return labels, "recipe" if task.labels is not None else "data"


def infer_labels(examples: Sequence[Example], most: int) -> tuple[str, ...]:
    """The distinct training answers, sorted, if they look like labels; none if they look like free text.

    Labels are few (2 to `most`). Each occurs at least twice, because a value seen once suggests that others are still
    to come. And they are few compared with the samples, at most the square root of their number: a sample of a long
    list of names or values is not a set of classes. Evaluation answers are ignored, since a model must not learn from
    what it is tested on.
    """
    counts = Counter(compose(example.answer) for example in examples)
    few = 2 <= len(counts) <= min(most, math.isqrt(len(examples)))
    return tuple(sorted(counts)) if few and min(counts.values()) > 1 and all(counts) else ()


def warn_of_few_answers(name: str, most: int, examples: Sequence[Example]) -> None:
    """Log a warning if answers that count as free text may be labels after all: they are few, and most occur twice."""
    counts = Counter(compose(example.answer) for example in examples)
    again = sum(count > 1 for count in counts.values())
    if 2 <= len(counts) <= most and 2 * again > len(counts):
        logger.warning(
            "task %r: its %d distinct answers in %d training samples count as free text, not as labels (of which there "
            "are at most the square root of the samples, each at least twice); if they are labels, state `labels`; if "
            "not, `labels: []`",
            name,
            len(counts),
            len(examples),
        )


def check_labels(labels: Sequence[str]) -> None:
    """Raise BadInput for fewer than two labels, an empty one or a duplicate."""
    if len(labels) < 2:
        raise BadInput(
            f"{len(labels)} label(s) stated; a classification task needs at least two; a task that generates text "
            "has `labels: []`"
        )
    for index, label in enumerate(labels):
        if not label.strip() or label != label.strip():
            raise BadInput(f"label {index} is {label!r}; a label must not be empty, nor start or end with white space")
        if label in labels[:index]:
            raise BadInput(f"label {label!r} is stated twice (labels are compared in Unicode's normal form C)")


def check_answers(split: Split, labels: Sequence[str]) -> None:
    """Raise BadInput for the first sample whose answer is not a label."""
    allowed = frozenset(labels)
    for index, example in enumerate(split.examples):
        if compose(example.answer) not in allowed:
            raise BadInput(
                f"{split.where(index)}: answer {example.answer!r} is not one of the labels {enumerate_names(labels)}"
            )


def _composed(example: Example) -> Example:
    # Labels are compared in normal form C, so answers must have it too.
    if example.answer.isascii() and not example.references:
        return example
    return replace(example, answer=compose(example.answer), references=tuple(map(compose, example.references)))


def check_warmup(recipe: Recipe, tasks: Sequence[Task], ranks: int) -> None:
    """Raise BadInput if no task has as many optimiser steps as `train.warmup_steps`; this needs data, but no model.

    Streams with plain text are not checked, because only tokenisation shows how many samples a text makes.
    """
    train = recipe.train
    if train.warmup_steps == 0 or any(task.kind == "text" for task in tasks):
        return
    # Methods that rehearse past samples, or learn all tasks at once, add at most the samples of the other tasks.
    everything = sum(len(task.train) for task in tasks)
    rehearses = any(method.adds_samples for method in recipe.method)
    batch = train.micro_batch_size * train.gradient_accumulation * ranks
    most = 0
    for config, task in zip(recipe.stream.tasks, tasks, strict=True):
        samples = everything if rehearses else len(task.train)
        steps = (config.epochs or train.epochs) * math.ceil(samples / batch)
        steps = min(steps, train.max_steps_per_task or steps)
        most = max(most, steps + sum(method.extra_steps(steps) for method in recipe.method))
    if train.warmup_steps > most:
        raise BadInput(
            f"train.warmup_steps: {train.warmup_steps}, but the longest task has {most} optimiser steps, so that "
            f"train.learning_rate would never be reached; allowed: at most {most}"
        )
