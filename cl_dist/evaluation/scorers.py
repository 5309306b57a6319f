"""Scoring the samples of a task: one scorer for each mode and place of the answer."""

from __future__ import annotations

import math
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
from cl_dist.evaluation.inference import device_of, generate
from cl_dist.evaluation.modes import resolve_metric
from cl_dist.evaluation.result import CUT_GENERATIONS, Mode, Prediction, weighted_mean
from cl_dist.evaluation.scores import comparison, joint_goal_accuracy, macro_f1
from cl_dist.models.structure import base_model
from cl_dist.tasks.collate import Batch, collate
from cl_dist.tasks.encode import Encoder
from cl_dist.tasks.objectives import OBJECTIVES
from cl_dist.tasks.tokenised import TokenisedData
from cl_dist.tasks.types import IGNORE, Encoded, Slot, Task

MASK_SEED = 0
"""Seed of the masks in evaluation, independent of the run's seed: all runs are scored on the same tokens."""


@dataclass(frozen=True)
class Subject:
    """The model under evaluation, with its tokenizer and the tasks' tokenised data."""

    model: nn.Module
    """The module inside the engine; its weights may be sharded (ZeRO-3)."""
    tokenizer: PreTrainedTokenizerBase
    objective: ObjectiveName
    """The resolved objective."""
    data: TokenisedData
    label_names: tuple[str, ...]
    """All labels of the stream, in the order of the classification head's outputs."""
    synced: bool
    """Whether all ranks must run the same forward passes (ZeRO-3)."""

    @property
    def encoder(self) -> Encoder:
        """The stream's encoder."""
        return self.data.encoder


class Total(NamedTuple):
    """A task's score and what is reported with it."""

    score: float
    extras: dict[str, float]
    """Further numbers by name."""


class Scorer(Protocol):
    """Scores samples of one task."""

    metric: str
    """Name of the metric."""
    lengths: list[int]
    """Number of tokens of each sample, in file order; batches are sorted by it."""
    batch_size: int
    """Maximum number of samples in a batch."""

    def score(self, indices: Sequence[int]) -> list[Prediction]:
        """Predictions for these samples, in this order. If synced, all ranks run the same number of forward passes."""
        ...

    def total(self, predictions: Sequence[Prediction]) -> Total:
        """The task's score from all its predictions, in file order."""
        ...


def make_scorer(mode: Mode, subject: Subject, task: Task, config: EvalConfig) -> Scorer:
    """The scorer of a task in the mode that `resolve_mode` returned. Raises `BadInput` for an empty prompt or text."""
    if mode == "perplexity":
        return PerplexityScorer(subject, task, config)
    if mode == "generate":
        return GenerationScorer(subject, task, config)
    answer = FACTS[subject.objective].answer
    if answer is None:
        raise BadInput(
            f"task {task.name!r}: eval.mode likelihood cannot score {subject.objective}, which has no answers"
        )
    return LIKELIHOOD_SCORERS[answer](subject, task, config)


class Answer(NamedTuple):
    """A model's answer to one prompt."""

    text: str
    cut: bool = False
    """Whether it was generated and cut at `eval.max_new_tokens`."""


class PromptScorer:
    """Common to likelihood and generation: encoded prompts, and answers compared with references as text."""

    def __init__(self, subject: Subject, task: Task, config: EvalConfig) -> None:
        self.subject, self.task, self.config = subject, task, config
        self.metric = resolve_metric(task, "generate", config)
        self.comparison = comparison(self.metric, config)
        self.batch_size = config.batch_size
        self.prompts = subject.data.prompts(task)
        self.lengths = self.prompts.lengths.tolist()
        if 0 in self.lengths:
            raise BadInput(f"task {task.name!r}: evaluation sample {self.lengths.index(0)} has an empty prompt")

    def score(self, indices: Sequence[int]) -> list[Prediction]:
        """Compare the model's answers with the references."""
        answers = self.answer([self.prompts[index].input_ids for index in indices])
        return [self._prediction(index, answer) for index, answer in zip(indices, answers, strict=True)]

    def total(self, predictions: Sequence[Prediction]) -> Total:
        """The metric over the whole task, with its counterpart as an extra."""
        mean = weighted_mean(predictions)
        # The share of turns, and of slots.
        if self.metric == "jga":
            return Total(joint_goal_accuracy(self._slots(predictions)), {"slot_accuracy": mean})
        # With labels: accuracy and macro-F1.
        if not self.task.labels or not self.comparison.exact:
            return Total(mean, {})
        pairs = [(each.prediction, each.reference) for each in predictions]
        f1 = macro_f1(pairs, self.task.labels, self.comparison.normaliser)
        return Total(f1, {"exact_match": mean}) if self.metric == "macro_f1" else Total(mean, {"macro_f1": f1})

    def answer(self, prompts: Sequence[list[int]]) -> list[Answer]:
        """The model's answers to encoded prompts."""
        raise NotImplementedError

    def _slots(self, predictions: Sequence[Prediction]) -> Iterator[tuple[Slot, bool]]:
        """Each sample's slot, and whether the prediction is right."""
        for each in predictions:
            slot = self.task.evaluation[each.index].slot
            if slot is not None:  # `resolve_mode` made sure that every sample has one
                yield slot, each.score == 1.0

    def _prediction(self, index: int, answer: Answer) -> Prediction:
        """Score an answer against the closest of its references; the first one if there is a tie."""
        example = self.task.evaluation[index]
        scores = {
            reference: self.comparison.score(answer.text, reference)
            for reference in example.references or (example.answer,)
        }
        closest = max(scores, key=lambda reference: scores[reference])
        return Prediction(index, answer.text, closest, scores[closest], cut=answer.cut)


class LikelihoodScorer(PromptScorer):
    """Chooses the most likely of the task's labels; the first one if there is a tie."""

    def answer(self, prompts: Sequence[list[int]]) -> list[Answer]:
        """The most likely label for each prompt."""
        return [Answer(self.task.labels[choice]) for choice in self.scores(prompts).argmax(dim=1).tolist()]

    def scores(self, prompts: Sequence[list[int]]) -> torch.Tensor:
        """(prompts, labels), on the CPU: the score of each label."""
        raise NotImplementedError


class HeadLikelihood(LikelihoodScorer):
    """Scores labels by the outputs of a classification head."""

    def __init__(self, subject: Subject, task: Task, config: EvalConfig) -> None:
        super().__init__(subject, task, config)
        self._label_ids = [subject.label_names.index(label) for label in task.labels]

    def scores(self, prompts: Sequence[list[int]]) -> torch.Tensor:
        """See `likelihood.head_scores`."""
        return likelihood.head_scores(self.subject.model, prompts, self._label_ids, self.subject.encoder.pad_id)


class DecoderLikelihood(LikelihoodScorer):
    """Scores labels with the decoder of an encoder-decoder."""

    def __init__(self, subject: Subject, task: Task, config: EvalConfig) -> None:
        super().__init__(subject, task, config)
        self._labels = [subject.encoder.scored_ids(label) for label in task.labels]

    def scores(self, prompts: Sequence[list[int]]) -> torch.Tensor:
        """See `likelihood.seq2seq_scores`."""
        model, pad_id = self.subject.model, self.subject.encoder.pad_id
        return likelihood.seq2seq_scores(model, prompts, self._labels, pad_id, self.batch_size)


class ContinuationLikelihood(LikelihoodScorer):
    """Scores labels as continuations of the prompt; packed after a single copy of the prompt if the model allows it."""

    def __init__(self, subject: Subject, task: Task, config: EvalConfig) -> None:
        super().__init__(subject, task, config)
        self._labels = [subject.encoder.scored_ids(label) for label in task.labels]
        # Decided once per task, from the same inputs on all ranks, so that the ranks agree.
        columns = max(self.lengths) + sum(len(label) for label in self._labels)
        model, pad_id = subject.model, subject.encoder.pad_id
        self._packed = likelihood.can_pack(model, columns) and likelihood.packing_agrees(
            model, self.prompts[0].input_ids, self._labels[:2], pad_id
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
"""By where an objective places its answers."""


class GenerationScorer(PromptScorer):
    """Compares generated text with the references."""

    def answer(self, prompts: Sequence[list[int]]) -> list[Answer]:
        """The greedy continuation of each prompt, without what the chat template adds after an answer."""
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
        """Add the number of answers cut at `eval.max_new_tokens`."""
        score, extras = super().total(predictions)
        return Total(score, {**extras, CUT_GENERATIONS: sum(each.cut for each in predictions)})


class PerplexityScorer:
    """Mean log-likelihood of the target tokens of the evaluation split, chunk by chunk.

    Perplexity is `exp(-sum of log-likelihoods / number of target tokens)` over a whole task; lower is better. In the
    accuracy matrix higher must be better, so the score is the mean log-likelihood per token, `-log(perplexity)`, and
    the perplexity is an extra. Under masked LM it is the pseudo-perplexity of tokens masked as in training, the same
    ones at every evaluation.
    """

    metric = "log_likelihood"

    def __init__(self, subject: Subject, task: Task, config: EvalConfig) -> None:
        self._subject = subject
        self._chunks = subject.data.chunks(task)
        if not self._chunks:
            raise BadInput(f"task {task.name!r}: the evaluation text is too short to predict any token")
        self.lengths = self._chunks.lengths.tolist()
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
        """Mean log-likelihood per target token, and the corresponding perplexity."""
        mean = weighted_mean(predictions)
        return Total(mean, {"perplexity": perplexity(mean)})


def text_batch(
    samples: Sequence[Encoded], objective: ObjectiveName, tokenizer: PreTrainedTokenizerBase, pad_id: int
) -> Batch:
    """A padded batch of text, prepared as in training; which tokens are masked depends only on the samples' indices."""
    return OBJECTIVES[objective].pose(collate(list(samples), objective, pad_id), tokenizer, MASK_SEED)


def log_likelihoods(model: nn.Module, batch: Batch, objective: ObjectiveName) -> list[tuple[float, int]]:
    """For each sample, the sum of its targets' log-likelihoods in nats, and the number of targets."""
    device = device_of(model)
    logits = model(**{name: tensor.to(device) for name, tensor in batch.inputs.items()}).logits
    logits, targets = OBJECTIVES[objective].aligned(logits, batch.labels.to(device))
    sums = likelihood.log_probabilities(logits, targets).sum(1, dtype=torch.float64)
    return list(zip(sums.tolist(), (targets != IGNORE).sum(1).tolist(), strict=True))


def perplexity(log_likelihood: float) -> float:
    """Perplexity from the mean log-likelihood per token; infinite if it overflows."""
    try:
        return math.exp(-log_likelihood)
    except OverflowError:
        return math.inf
