"""What is known about a run's scores before training: answers that no model could give, and what readers of the
scores should know. Imports no torch.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from cl_dist.config.objectives import FACTS, ObjectiveName
from cl_dist.config.schema import EvalConfig
from cl_dist.config.words import shorten
from cl_dist.errors import BadInput
from cl_dist.evaluation.choice import resolve_metric, resolve_mode
from cl_dist.evaluation.scores import Comparison, comparison, normalise
from cl_dist.heartbeat import beat
from cl_dist.progress import different_scores
from cl_dist.tasks.encode import Encoder
from cl_dist.tasks.types import Task


@dataclass(frozen=True)
class Notice:
    """Something to know about the scores of a task."""

    task: str | None
    """None where it concerns all of them together."""
    about: str
    """A word for programs."""
    text: str
    on_screen: bool = True
    """Whether it is a warning; otherwise the log alone has it."""


def outlook(
    tasks: Sequence[Task], encoder: Encoder, objective: ObjectiveName, config: EvalConfig
) -> tuple[Notice, ...]:
    """What is to be known about the tasks' scores, in the tasks' order.

    Raises:
        BadInput: A task cannot be scored as the settings say, or has labels of which the right one cannot be found.
    """
    notices: list[Notice] = []
    for task in tasks:
        beat()
        notices += _of_task(task, encoder, objective, config)
    return (*notices, *_of_template(encoder), *_of_metrics(tasks, objective, config))


def _of_template(encoder: Encoder) -> Iterator[Notice]:
    if encoder.unanswered_cue:
        text = (
            f"train.template: chat: the template asks for an answer with {encoder.unanswered_cue!r} but its answered "
            "turns do not contain it; prompts leave it out, in training and in evaluation"
        )
        yield Notice(None, "template", text)


def _of_metrics(tasks: Sequence[Task], objective: ObjectiveName, config: EvalConfig) -> Iterator[Notice]:
    names = {task.name: resolve_metric(task, resolve_mode(task, objective, config), config) for task in tasks}
    if different := different_scores(names):
        yield Notice(
            None,
            "metrics",
            f"AP, BWT and the other metrics are means of different scores: {different} (eval.metric)",
        )


def _of_task(task: Task, encoder: Encoder, objective: ObjectiveName, config: EvalConfig) -> Iterator[Notice]:
    mode = resolve_mode(task, objective, config)
    yield from _of_data(task)
    if mode == "perplexity":
        return
    compared = comparison(resolve_metric(task, mode, config), config)
    if task.labels:
        _check_for_scorer(task, compared)
        yield from _of_labels(task, compared)
    if mode == "likelihood" and FACTS[objective].generates:
        _check_tokens(task, encoder)
    if mode == "generate":
        if task.labels and compared.exact:
            _check_written(task, encoder, compared)
        else:
            yield from _of_losses(task, encoder, compared)
        yield from _of_length(task, encoder, config)
        if compared.metric == "rouge_l" and config.rouge_tokenizer == "default":
            yield from _of_scripts(task)


def _check_for_scorer(task: Task, compared: Comparison) -> None:
    """Raise BadInput for labels that the scorer takes for one, or for nothing, though they differ in more than case."""
    if (pair := _alike(task.labels, compared.normaliser)) and normalise(pair[0]) != normalise(pair[1]):
        raise BadInput(
            f"task {task.name!r}: the labels {pair[0]!r} and {pair[1]!r} are the same without punctuation, so either "
            "would count as the other; set eval.normalise: none, or rename one"
        )
    empty = next((label for label in task.labels if not compared.normaliser(label)), None)
    if empty is not None:
        raise BadInput(
            f"task {task.name!r}: nothing is left of the label {empty!r} without punctuation; set eval.normalise: "
            "none, or rename it"
        )


def _check_tokens(task: Task, encoder: Encoder) -> None:
    """Raise BadInput for two labels of the same tokens: both always have the same likelihood."""
    if pair := _alike(task.labels, lambda label: tuple(encoder.scored_ids(label))):
        raise BadInput(
            f"task {task.name!r}: the labels {pair[0]!r} and {pair[1]!r} are the same tokens to this model's tokenizer "
            f"({encoder.answer_text(encoder.scored_ids(pair[0]))!r}), so it cannot tell them apart; rename one, or use "
            "a model whose vocabulary has their characters"
        )


def _check_written(task: Task, encoder: Encoder, compared: Comparison) -> None:
    """Raise BadInput for a label that no generated text is equal to."""
    for label in task.labels:
        written = encoder.answer_text(encoder.generated_ids(label))
        if compared.score(written, label) < 1:
            raise BadInput(
                f"task {task.name!r}: the label {label!r} cannot be generated: the tokenizer or the chat template "
                f"makes {written!r} of it, which is never right; rename it, or score by eval.mode: likelihood"
            )


def _of_data(task: Task) -> Iterator[Notice]:
    if task.scored_on == "train":
        text = "has no evaluation file, so it is scored on its training data: such scores say nothing about new samples"
        yield Notice(task.name, "scored_on", f"task {task.name!r} {text}")
    elif known := _learnt(task):
        count = len(task.evaluation)
        text = f"the samples of its {task.scored_on} split are those that it is trained on"
        if known < count:
            text = f"{known} of {count} samples of its {task.scored_on} split are among those that it is trained on"
        yield Notice(task.name, "scored_on", f"task {task.name!r}: {text}", on_screen=2 * known >= count)


def _learnt(task: Task) -> int:
    """How many evaluation samples are training samples, to the letter."""
    learnt = {(each.prompt, each.answer) for each in task.train}
    return sum((each.prompt, each.answer) in learnt for each in task.evaluation)


def _of_labels(task: Task, compared: Comparison) -> Iterator[Notice]:
    if task.labels_from == "training answers":
        text = f"task {task.name!r}: {len(task.labels)} labels found in the training answers: {', '.join(task.labels)}"
        yield Notice(task.name, "labels", text, on_screen=False)
    if task.unlisted:
        yield Notice(
            task.name,
            "answers_outside_labels",
            f"task {task.name!r}: the answers of {task.unlisted} of {len(task.evaluation)} evaluation samples match "
            f"none of the {len(task.labels)} labels found in the training answers, so no prediction can be right "
            "there; state the task's `labels`, or `labels: []` if it should generate text",
        )
    if pair := _alike(task.labels, compared.normaliser):
        what = "case" if pair[0].casefold() == pair[1].casefold() else "case or white space"
        text = (
            f"the labels {pair[0]!r} and {pair[1]!r} differ in {what} alone, so the scorer counts either as the other"
        )
        yield Notice(task.name, "labels_alike", f"task {task.name!r}: {text}")
    if pair := _alike(task.labels, _visible):
        text = f"the labels {pair[0]!r} and {pair[1]!r} differ in characters that cannot be seen, and count as two"
        yield Notice(task.name, "labels_alike", f"task {task.name!r}: {text}")


def _of_length(task: Task, encoder: Encoder, config: EvalConfig) -> Iterator[Notice]:
    """References that no generation can reach in full."""
    lengths = [len(encoder.generated_ids(reference)) for reference in _references(task)]
    longer = sum(length > config.max_new_tokens for length in lengths)
    if longer:
        yield Notice(
            task.name,
            "long_references",
            f"task {task.name!r}: {longer} of {len(lengths)} reference answers take more than {config.max_new_tokens} "
            f"tokens (the longest {max(lengths)}), and generation is cut there (eval.max_new_tokens)",
        )


def _of_losses(task: Task, encoder: Encoder, compared: Comparison) -> Iterator[Notice]:
    """References that the tokenizer, or a chat template that edits answers, cannot give back."""
    lost: list[tuple[str, str]] = []
    references = _references(task)
    for reference in references:
        written = encoder.answer_text(encoder.generated_ids(reference))
        same = normalise(written) == normalise(reference)
        if not same and compared.score(written, reference) < compared.score(reference, reference):
            lost.append((reference, written))
    if lost:
        reference, written = (repr(shorten(text)) for text in lost[0])
        yield Notice(
            task.name,
            "lost_text",
            f"task {task.name!r}: {len(lost)} of {len(references)} reference answers cannot be generated: the "
            f"tokenizer or the chat template makes {written} of {reference}, so that even a right answer scores "
            "less than 1",
        )


def _of_scripts(task: Task) -> Iterator[Notice]:
    """References of whose letters ROUGE's default tokenizer drops most."""
    references = _references(task)
    dropped = sum(_mostly_dropped(reference) for reference in references)
    if dropped:
        yield Notice(
            task.name,
            "rouge_tokenizer",
            f"task {task.name!r}: {dropped} of {len(references)} reference answers are written in characters that "
            "ROUGE-L's default tokenizer drops, so that even the same text can score 0; set eval.rouge_tokenizer: "
            "unicode or xlingual, or eval.metric: exact_match",
        )


def _mostly_dropped(text: str) -> bool:
    """Whether the default tokenizer keeps fewer characters than it drops: it knows ASCII letters and digits alone."""
    kept = sum(character.isascii() and character.isalnum() for character in text)
    dropped = sum(not character.isascii() and character.isalnum() for character in text)
    return dropped > kept or (kept == 0 and bool(text.strip()))


def _references(task: Task) -> list[str]:
    """All answers that are right, each text once, in file order."""
    return list(dict.fromkeys(chain.from_iterable(each.references or (each.answer,) for each in task.evaluation)))


def _alike(labels: Iterable[str], look: Callable[[str], Hashable]) -> tuple[str, str] | None:
    """The first two labels that look the same."""
    seen: dict[Hashable, str] = {}
    for label in labels:
        other = seen.setdefault(look(label), label)
        if other != label:
            return other, label
    return None


def _visible(text: str) -> str:
    """The text without characters that only format it: zero-width blanks, byte order marks, soft hyphens."""
    return "".join(character for character in text if unicodedata.category(character) != "Cf")
