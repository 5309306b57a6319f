"""Scores tasks with the model that is being trained, on all ranks together."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch.distributed as dist
from torch import nn
from transformers import PreTrainedTokenizerBase

from cl_dist.config.schema import EvalConfig
from cl_dist.evaluation.batches import cut_batches, deal_batches, rounds
from cl_dist.evaluation.choice import resolve_mode
from cl_dist.evaluation.modes import Scorer, Subject, make_scorer
from cl_dist.evaluation.perplexity import perplexity
from cl_dist.evaluation.result import Mode, Prediction, TaskScore, weighted_mean
from cl_dist.evaluation.wrapped import evaluating
from cl_dist.tasks.encode import Encoder, Objective
from cl_dist.tasks.types import Task

PAUSE_BATCHES = 8
"""Batches between two pauses, at which the ranks meet: at every batch the faster ones would wait for the slowest."""


def no_pause() -> None:
    """Nothing to do between batches."""


class Evaluator:
    """Scores tasks; every rank calls it with the same tasks in the same order.

    `model` is the module inside the engine, `objective` the resolved one, `synced` whether its weights are sharded over
    the ranks (ZeRO-3), so that all must run the same forwards.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        objective: Objective,
        encoder: Encoder,
        label_names: tuple[str, ...],
        config: EvalConfig,
        rank: int,
        world: int,
        synced: bool,
    ) -> None:
        self._subject = Subject(model, tokenizer, objective, encoder, label_names, synced)
        self._config = config
        self._rank, self._world = rank, world

    def check_modes(self, tasks: Iterable[Task]) -> None:
        """Raise BadInput for the first task that cannot be scored as the settings say."""
        for task in tasks:
            resolve_mode(task, self._subject.objective, self._config)

    def evaluate(self, task: Task, pause: Callable[[], None] = no_pause) -> TaskScore:
        """Score a task's evaluation split. A collective operation; every rank gets the score, rank 0 the predictions
        too.

        `pause` is called before the first batch and after every few, by all ranks equally often, so that it may be
        collective; an exception that it raises on all of them ends the evaluation.
        """
        mode = resolve_mode(task, self._subject.objective, self._config)
        with evaluating(self._subject.model):
            scorer = make_scorer(mode, self._subject, task, self._config)
            predictions = self._gather(self._score_own(scorer, pause))
        return self._summary(task, mode, scorer.metric, predictions)

    def _score_own(self, scorer: Scorer, pause: Callable[[], None]) -> list[Prediction]:
        """This rank's share of the predictions."""
        batches = cut_batches(scorer.lengths, scorer.batch_size)
        own: list[Prediction] = []
        dealt = deal_batches(batches, self._rank, self._world, self._subject.synced)
        for start in range(0, rounds(batches, self._world), PAUSE_BATCHES):
            pause()
            for batch in dealt[start : start + PAUSE_BATCHES]:
                predictions = scorer.score(batch.indices)
                own += predictions if batch.counted else []
        return own

    def _gather(self, own: list[Prediction]) -> list[Prediction]:
        """All ranks' predictions in file order."""
        shares = [own]
        if self._world > 1:
            shares = [[] for _ in range(self._world)]
            dist.all_gather_object(shares, own)
        return sorted((prediction for share in shares for prediction in share), key=lambda prediction: prediction.index)

    def _summary(self, task: Task, mode: Mode, metric: str, predictions: list[Prediction]) -> TaskScore:
        """The task's score; sums run in file order, so that every number of ranks rounds alike."""
        score = weighted_mean(predictions)
        return TaskScore(
            task=task.name,
            mode=mode,
            metric=metric,
            score=score,
            count=len(predictions),
            predictions=predictions if self._rank == 0 else [],
            extras={"perplexity": perplexity(score)} if mode == "perplexity" else {},
        )
