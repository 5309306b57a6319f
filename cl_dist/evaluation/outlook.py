"""What can be said about a run's scores before training. Imports no torch.

Errors, if no model could give the right answers; and notices for whoever reads the scores.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from cl_dist.config.objectives import FACTS, ObjectiveName
from cl_dist.config.schema import EvalConfig
from cl_dist.config.words import listed, shorten
from cl_dist.errors import BadInput
from cl_dist.evaluation.modes import resolve_metric, resolve_mode
from cl_dist.evaluation.scores import Comparison, comparison, normalise
from cl_dist.heartbeat import beat
from cl_dist.progress import MOST_NAMED, different_scores, score_names
from cl_dist.tasks.encode import Encoder
from cl_dist.tasks.types import Task


@dataclass(frozen=True)
class Notice:
    """A remark about the scores of a task."""

    task: str | None
    """None if it is about all tasks."""
    about: str
    """Its kind, for programs."""
    text: str
    on_screen: bool = True
    """Whether it is shown as a warning; otherwise it is only logged."""


def outlook(
    tasks: Sequence[Task], encoder: Encoder, objective: ObjectiveName, config: EvalConfig
) -> tuple[Notice, ...]:
    """Notices about the tasks' scores, in the order of the tasks.

    Raises:
        BadInput: A task cannot be scored with these settings, or has labels that cannot be told apart or generated.
    """
    notices: list[Notice] = []
    for task in tasks:
        beat()
        notices += _of_task(task, encoder, objective, config)
    return (*notices, *_of_inferred(tasks), *_of_template(encoder), *_of_metrics(tasks, objective, config))


def _of_inferred(tasks: Sequence[Task]) -> Iterator[Notice]:
    """One line on the screen for all tasks whose labels nobody stated."""
    found = [f"{task.name} {len(task.labels)}" for task in tasks if task.labels_from == "training answers"]
    if found:
        text = f"labels found in the training answers: {listed(found, MOST_NAMED)}; to state them, set `labels`"
        yield Notice(None, "labels", text)


def _of_template(encoder: Encoder) -> Iterator[Notice]:
    if encoder.unanswered_cue:
        text = (
            f"train.template: chat: the template asks for an answer with {encoder.unanswered_cue!r} but its answered "
            "turns do not contain it; prompts leave it out, in training and in evaluation"
        )
        yield Notice(None, "template", text)


def _of_metrics(tasks: Sequence[Task], objective: ObjectiveName, config: EvalConfig) -> Iterator[Notice]:
    modes = {task.name: resolve_mode(task, objective, config) for task in tasks}
    metrics = {task.name: resolve_metric(task, modes[task.name], config) for task in tasks}
    if different := different_scores(score_names({"metric": metrics, "mode": modes})):
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
    """Raise `BadInput` for labels that become equal or empty without punctuation."""
    if (pair := _alike(task.labels, compared.normaliser)) and normalise(pair[0]) != normalise(pair[1]):
        raise BadInput(
            f"task {task.name!r}: the labels {pair[0]!r} and {pair[1]!r} are the same without punctuation, so the "
            "scorer cannot tell them apart; set eval.normalise: none, or rename one"
        )
    empty = next((label for label in task.labels if not compared.normaliser(label)), None)
    if empty is not None:
        raise BadInput(
            f"task {task.name!r}: nothing is left of the label {empty!r} without punctuation; set eval.normalise: "
            "none, or rename it"
        )


def _check_tokens(task: Task, encoder: Encoder) -> None:
    """Raise `BadInput` for two labels with the same tokens, which would always be equally likely."""
    if pair := _alike(task.labels, lambda label: tuple(encoder.scored_ids(label))):
        raise BadInput(
            f"task {task.name!r}: the labels {pair[0]!r} and {pair[1]!r} are the same tokens to this model's tokenizer "
            f"({encoder.answer_text(encoder.scored_ids(pair[0]))!r}), so it cannot tell them apart; rename one, or use "
            "a model whose vocabulary has their characters"
        )


def _check_written(task: Task, encoder: Encoder, compared: Comparison) -> None:
    """Raise `BadInput` for a label that no generated text can equal."""
    for label in task.labels:
        written = encoder.answer_text(encoder.generated_ids(label))
        if compared.score(written, label) < 1:
            raise BadInput(
                f"task {task.name!r}: the label {label!r} cannot be generated: the tokenizer or the chat template "
                f"turns it into {written!r}, which is never right; rename it, or set eval.mode: likelihood"
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
    """Number of evaluation samples that are identical to a training sample."""
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
            "there; set the task's `labels`, or `labels: []` if it should generate text",
        )
    if pair := _alike(task.labels, compared.normaliser):
        what = "case" if pair[0].casefold() == pair[1].casefold() else "case or white space"
        text = f"the labels {pair[0]!r} and {pair[1]!r} differ only in {what}, so the scorer does not tell them apart"
        yield Notice(task.name, "labels_alike", f"task {task.name!r}: {text}")
    if pair := _alike(task.labels, _visible):
        text = f"the labels {pair[0]!r} and {pair[1]!r} differ only in invisible characters, and count as two"
        yield Notice(task.name, "labels_alike", f"task {task.name!r}: {text}")


def _of_length(task: Task, encoder: Encoder, config: EvalConfig) -> Iterator[Notice]:
    """Notice about references that are longer than any generated answer."""
    lengths = [len(ids) for ids in encoder.each_generated(_references(task))]
    longer = sum(length > config.max_new_tokens for length in lengths)
    if longer:
        yield Notice(
            task.name,
            "long_references",
            f"task {task.name!r}: {longer} of {len(lengths)} reference answers take more than {config.max_new_tokens} "
            f"tokens (the longest {max(lengths)}), and generation is cut there (eval.max_new_tokens)",
        )


def _of_losses(task: Task, encoder: Encoder, compared: Comparison) -> Iterator[Notice]:
    """Notice about references that the tokenizer, or a chat template that edits answers, cannot reproduce."""
    lost: list[tuple[str, str]] = []
    references = _references(task)
    for reference, ids in zip(references, encoder.each_generated(references), strict=True):
        written = encoder.answer_text(ids)
        same = normalise(written) == normalise(reference)
        if not same and compared.score(written, reference) < compared.score(reference, reference):
            lost.append((reference, written))
    if lost:
        reference, written = (repr(shorten(text)) for text in lost[0])
        yield Notice(
            task.name,
            "lost_text",
            f"task {task.name!r}: {len(lost)} of {len(references)} reference answers cannot be generated: the "
            f"tokenizer or the chat template turns {reference} into {written}, so even a right answer scores "
            "less than 1",
        )


def _of_scripts(task: Task) -> Iterator[Notice]:
    """Notice about references whose characters are mostly dropped by ROUGE's default tokenizer."""
    references = _references(task)
    dropped = sum(_mostly_dropped(reference) for reference in references)
    if dropped:
        yield Notice(
            task.name,
            "rouge_tokenizer",
            f"task {task.name!r}: {dropped} of {len(references)} reference answers are written in characters that "
            "ROUGE-L's default tokenizer drops, so even an identical text can score 0; set eval.rouge_tokenizer: "
            "unicode or xlingual, or eval.metric: exact_match",
        )


def _mostly_dropped(text: str) -> bool:
    """Whether ROUGE's default tokenizer, which keeps only ASCII letters and digits, drops most characters."""
    kept = sum(character.isascii() and character.isalnum() for character in text)
    dropped = sum(not character.isascii() and character.isalnum() for character in text)
    return dropped > kept or (kept == 0 and bool(text.strip()))


def _references(task: Task) -> list[str]:
    """All right answers, without duplicates, in file order."""
    return list(dict.fromkeys(chain.from_iterable(each.references or (each.answer,) for each in task.evaluation)))


def _alike(labels: Iterable[str], look: Callable[[str], Hashable]) -> tuple[str, str] | None:
    """The first two labels for which `look` gives the same result."""
    seen: dict[Hashable, str] = {}
    for label in labels:
        other = seen.setdefault(look(label), label)
        if other != label:
            return other, label
    return None


def _visible(text: str) -> str:
    """The text without invisible format characters: zero-width spaces, byte order marks, soft hyphens."""
    return "".join(character for character in text if unicodedata.category(character) != "Cf")
