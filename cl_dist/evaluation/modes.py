"""How a task is scored: one scorer for each mode."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from cl_dist.config.objectives import FACTS, AnswerPlace, ObjectiveName
from cl_dist.config.schema import EvalConfig
from cl_dist.errors import BadInput
from cl_dist.evaluation import likelihood
from cl_dist.evaluation.choice import resolve_metric
from cl_dist.evaluation.generate import generate
from cl_dist.evaluation.jga import joint_goal_accuracy
from cl_dist.evaluation.perplexity import log_likelihoods, perplexity, text_batch
from cl_dist.evaluation.result import CUT_GENERATIONS, Mode, Prediction, weighted_mean
from cl_dist.evaluation.scores import comparison, macro_f1
from cl_dist.models.structure import base_model
from cl_dist.tasks.encode import Encoder
from cl_dist.tasks.types import Slot, Task


@dataclass(frozen=True)
class Subject:
    """The model under evaluation and what goes with it."""

    model: nn.Module
    """The module inside the engine; its weights may be sharded (ZeRO-3)."""
    tokenizer: PreTrainedTokenizerBase
    objective: ObjectiveName
    """The resolved one."""
    encoder: Encoder
    label_names: tuple[str, ...]
    """Labels of the whole stream, in the order of the classification head's outputs."""
    synced: bool
    """Whether all ranks must run the same forwards (ZeRO-3)."""


class Total(NamedTuple):
    """A task's score and what is told beside it."""

    score: float
    extras: dict[str, float]
    """Further numbers by name."""


class Scorer(Protocol):
    """Scores samples of one task."""

    metric: str
    """Name of the samples' score."""
    lengths: list[int]
    """Tokens of each sample, in file order: what batches are sorted by."""
    batch_size: int
    """Most samples in a batch."""

    def score(self, indices: Sequence[int]) -> list[Prediction]:
        """Predictions for these samples, in this order; runs the same number of forwards on all ranks if synced."""
        ...

    def total(self, predictions: Sequence[Prediction]) -> Total:
        """What all predictions of the task, in file order, come to."""
        ...


def make_scorer(mode: Mode, subject: Subject, task: Task, config: EvalConfig) -> Scorer:
    """The scorer of a task in a mode that `resolve_mode` gave; raises BadInput where a sample cannot be encoded."""
    if mode == "perplexity":
        return PerplexityScorer(subject, task, config)
    if mode == "generate":
        return GenerationScorer(subject, task, config)
    answer = FACTS[subject.objective].answer
    if answer is None:
        raise BadInput(f"task {task.name!r}: eval.mode likelihood is not for {subject.objective}, which has no answers")
    return LIKELIHOOD_SCORERS[answer](subject, task, config)


class Answer(NamedTuple):
    """A model's answer to one prompt."""

    text: str
    cut: bool = False
    """Whether it was generated and ended by `eval.max_new_tokens`."""


class PromptScorer:
    """What likelihood and generation share: encoded prompts, and a score that compares texts."""

    def __init__(self, subject: Subject, task: Task, config: EvalConfig) -> None:
        self.subject, self.task, self.config = subject, task, config
        self.metric = resolve_metric(task, "generate", config)
        self.comparison = comparison(self.metric, config)
        self.batch_size = config.batch_size
        self.prompts = [_prompt(subject.encoder, task, index) for index in range(len(task.evaluation))]
        self.lengths = [len(prompt) for prompt in self.prompts]

    def score(self, indices: Sequence[int]) -> list[Prediction]:
        """Compare what the model answers with the references."""
        answers = self.answer([self.prompts[index] for index in indices])
        return [self._prediction(index, answer) for index, answer in zip(indices, answers, strict=True)]

    def total(self, predictions: Sequence[Prediction]) -> Total:
        """The samples' mean; for a task with labels macro-F1 too, as the score or beside it. With `jga` the share of
        turns, and beside it the share of slots.
        """
        mean = weighted_mean(predictions)
        if self.metric == "jga":
            return Total(joint_goal_accuracy(self._slots(predictions)), {"slot_accuracy": mean})
        if not self.task.labels or not self.comparison.exact:
            return Total(mean, {})
        pairs = [(each.prediction, each.reference) for each in predictions]
        f1 = macro_f1(pairs, self.task.labels, self.comparison.normaliser)
        return Total(f1, {"exact_match": mean}) if self.metric == "macro_f1" else Total(mean, {"macro_f1": f1})

    def answer(self, prompts: Sequence[list[int]]) -> list[Answer]:
        """The model's answers to encoded prompts."""
        raise NotImplementedError

    def _slots(self, predictions: Sequence[Prediction]) -> Iterator[tuple[Slot, bool]]:
        """What each sample asks for, and whether it is right."""
        for each in predictions:
            slot = self.task.evaluation[each.index].slot
            if slot is not None:  # no sample is without one (evaluation.choice)
                yield slot, each.score == 1.0

    def _prediction(self, index: int, answer: Answer) -> Prediction:
        """By the reference that it comes closest to, of equally close ones the first."""
        example = self.task.evaluation[index]
        scores = {
            reference: self.comparison.score(answer.text, reference)
            for reference in example.references or (example.answer,)
        }
        closest = max(scores, key=lambda reference: scores[reference])
        return Prediction(index, answer.text, closest, scores[closest], cut=answer.cut)


class LikelihoodScorer(PromptScorer):
    """Chooses the likeliest of the task's labels; of equally likely ones the first."""

    def answer(self, prompts: Sequence[list[int]]) -> list[Answer]:
        """The likeliest label for each prompt."""
        return [Answer(self.task.labels[choice]) for choice in self.scores(prompts).argmax(dim=1).tolist()]

    def scores(self, prompts: Sequence[list[int]]) -> torch.Tensor:
        """(prompts, labels), on the CPU: how likely each label is."""
        raise NotImplementedError


class HeadLikelihood(LikelihoodScorer):
    """By the outputs of a classification head."""

    def scores(self, prompts: Sequence[list[int]]) -> torch.Tensor:
        """See `likelihood.head_scores`."""
        label_ids = [self.subject.label_names.index(label) for label in self.task.labels]
        return likelihood.head_scores(self.subject.model, prompts, label_ids, self.subject.encoder.pad_id)


class DecoderLikelihood(LikelihoodScorer):
    """By the decoder of an encoder-decoder."""

    def __init__(self, subject: Subject, task: Task, config: EvalConfig) -> None:
        super().__init__(subject, task, config)
        self._labels = [subject.encoder.scored_ids(label) for label in task.labels]

    def scores(self, prompts: Sequence[list[int]]) -> torch.Tensor:
        """See `likelihood.seq2seq_scores`."""
        model, pad_id = self.subject.model, self.subject.encoder.pad_id
        return likelihood.seq2seq_scores(model, prompts, self._labels, pad_id, self.batch_size)


class ContinuationLikelihood(LikelihoodScorer):
    """As continuations of the prompt, by a decoder; packed behind one copy of the prompt if the model allows it."""

    def __init__(self, subject: Subject, task: Task, config: EvalConfig) -> None:
        super().__init__(subject, task, config)
        self._labels = [subject.encoder.scored_ids(label) for label in task.labels]
        # Decided for the whole task and from the same inputs on all ranks, so that they agree.
        columns = max(self.lengths) + sum(len(label) for label in self._labels)
        model, pad_id = subject.model, subject.encoder.pad_id
        self._packed = likelihood.can_pack(model, columns) and likelihood.packing_agrees(
            model, self.prompts[0], self._labels[:2], pad_id
        )

    def scores(self, prompts: Sequence[list[int]]) -> torch.Tensor:
        """See `likelihood.causal_scores`."""
        model, pad_id = self.subject.model, self.subject.encoder.pad_id
        return likelihood.causal_scores(model, prompts, self._labels, pad_id, self._packed, self.batch_size)


LIKELIHOOD_SCORERS: dict[AnswerPlace, type[LikelihoodScorer]] = {
    "behind prompt": ContinuationLikelihood,
    "apart": DecoderLikelihood,
    "class": HeadLikelihood,
}
"""By where an objective has its answers."""


class GenerationScorer(PromptScorer):
    """Compares what the model writes with the reference."""

    def answer(self, prompts: Sequence[list[int]]) -> list[Answer]:
        """The greedy continuation of each prompt, without what the chat template puts behind an answer."""
        subject = self.subject
        generated = generate(
            subject.model,
            subject.tokenizer,
            prompts,
            subject.encoder.pad_id,
            self.config.max_new_tokens,
            subject.synced,
            subject.encoder.stops,
        )
        return [Answer(subject.encoder.answer_text(each.ids), each.cut) for each in generated]

    def total(self, predictions: Sequence[Prediction]) -> Total:
        """And how many answers were cut at `eval.max_new_tokens`."""
        score, extras = super().total(predictions)
        return Total(score, {**extras, CUT_GENERATIONS: sum(each.cut for each in predictions)})


class PerplexityScorer:
    """Mean log-likelihood of the target tokens of the evaluation split, chunk by chunk."""

    metric = "log_likelihood"

    def __init__(self, subject: Subject, task: Task, config: EvalConfig) -> None:
        self._subject = subject
        self._chunks = subject.encoder.text_chunks(task.evaluation)
        if not self._chunks:
            raise BadInput(f"task {task.name!r}: the evaluation text is too short to predict a token of it")
        self.lengths = [len(chunk.input_ids) for chunk in self._chunks]
        vocabulary = base_model(subject.model).config.get_text_config().vocab_size
        self.batch_size = max(1, min(config.batch_size, likelihood.MAX_LOGITS // (max(self.lengths) * vocabulary)))

    def score(self, indices: Sequence[int]) -> list[Prediction]:
        """Log-likelihood per target token, weighted by the number of target tokens."""
        subject = self._subject
        chunks = [self._chunks[index] for index in indices]
        batch = text_batch(chunks, subject.objective, subject.tokenizer, subject.encoder.pad_id)
        sums = log_likelihoods(subject.model, batch, subject.objective)
        return [
            Prediction(index, "", "", total / tokens, tokens)
            for index, (total, tokens) in zip(indices, sums, strict=True)
        ]

    def total(self, predictions: Sequence[Prediction]) -> Total:
        """Mean log-likelihood of a target token, and the perplexity that it means."""
        mean = weighted_mean(predictions)
        return Total(mean, {"perplexity": perplexity(mean)})


def _prompt(encoder: Encoder, task: Task, index: int) -> list[int]:
    """The encoded prompt of an evaluation sample; an empty one gives the model nothing to answer from."""
    ids = encoder.prompt_ids(task.evaluation[index].prompt)
    if not ids:
        raise BadInput(f"task {task.name!r}: evaluation sample {index} has an empty prompt")
    return ids
