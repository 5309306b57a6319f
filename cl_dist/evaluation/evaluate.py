"""Scores tasks with the model that is being trained, on all ranks together.

Several small tasks share a pass, because a task with fewer batches than ranks would leave ranks idle.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import accumulate, chain

import torch.distributed as dist
from torch import nn
from transformers import PreTrainedTokenizerBase

from cl_dist.config.objectives import ObjectiveName
from cl_dist.config.schema import EvalConfig
from cl_dist.evaluation.batches import cut_pass, deal_batches, plan_passes, rounds
from cl_dist.evaluation.inference import evaluating
from cl_dist.evaluation.modes import resolve_mode
from cl_dist.evaluation.result import Prediction, TaskScore
from cl_dist.evaluation.scorers import Scorer, Subject, make_scorer
from cl_dist.tasks.tokenised import TokenisedData
from cl_dist.tasks.types import Task

PAUSE_BATCHES = 8
"""Batches between two pauses. The ranks wait for each other there, so pausing at every batch would be slow."""


def no_pause() -> None:
    """Do nothing between batches."""


def unheard(done: int, samples: int) -> None:
    """Report no progress."""


def stay_sharded() -> AbstractContextManager[bool]:
    """Leave the weights as they are."""
    return nullcontext(False)


class Evaluator:
    """Scores tasks; all ranks call it with the same tasks in the same order.

    `model` is the module inside the engine and `objective` the resolved one. `synced` says that the weights are sharded
    over the ranks (ZeRO-3), so that all must run the same forward passes, unless `whole` is a context (collective) that
    holds them whole and yields True. Generation asks for it: every token is a forward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        objective: ObjectiveName,
        data: TokenisedData,
        label_names: tuple[str, ...],
        config: EvalConfig,
        rank: int,
        world: int,
        synced: bool,
        whole: Callable[[], AbstractContextManager[bool]] = stay_sharded,
    ) -> None:
        self._subject = Subject(model, tokenizer, objective, data, label_names, synced)
        self._config = config
        self._rank, self._world = rank, world
        self._whole = whole

    def passes(self, tasks: Sequence[Task]) -> list[Sequence[Task]]:
        """Group the tasks, in order, into passes for `evaluate`."""
        # With sharded weights every task is a pass: only batches of one task take the same number of forward passes.
        # A single rank has nothing to gain from longer passes.
        if self._subject.synced or self._world == 1:
            return [[task] for task in tasks]
        # This is only an estimate for text, which is cut into chunks later.
        batches = [-(-len(task.evaluation) // self._config.batch_size) for task in tasks]
        return [tasks[each.start : each.stop] for each in plan_passes(batches, self._world)]

    def evaluate(
        self,
        tasks: Sequence[Task],
        pause: Callable[[], None] = no_pause,
        note: Callable[[int, int], None] = unheard,
    ) -> list[TaskScore]:
        """Score the evaluation splits of the tasks of one pass (collective).

        All ranks get the scores, and rank 0 the predictions too. `pause` is called before the first batch and after
        every `PAUSE_BATCHES`, the same number of times on all ranks, so it may be collective. An exception that it
        raises on all of them ends the evaluation. `note` is called after every batch of this rank, with the samples
        that are done by then and those of the whole pass, over all ranks.
        """
        modes = [resolve_mode(task, self._subject.objective, self._config) for task in tasks]
        wanted = self._subject.synced and "generate" in modes
        with evaluating(self._subject.model), self._whole() if wanted else stay_sharded() as whole:
            subject = replace(self._subject, synced=self._subject.synced and not whole)
            scorers = [make_scorer(mode, subject, task, self._config) for mode, task in zip(modes, tasks, strict=True)]
            gathered = self._gather(self._score_own(scorers, pause, note, subject.synced))
        scores = []
        for task, mode, scorer, found in zip(tasks, modes, scorers, gathered, strict=True):
            score, extras = scorer.total(found)
            kept = found if self._rank == 0 else []
            scores.append(TaskScore(task.name, mode, scorer.metric, score, len(found), kept, extras))
        return scores

    def _score_own(
        self, scorers: Sequence[Scorer], pause: Callable[[], None], note: Callable[[int, int], None], synced: bool
    ) -> list[list[Prediction]]:
        """This rank's share of each task's predictions."""
        batches = cut_pass([scorer.lengths for scorer in scorers], [scorer.batch_size for scorer in scorers])
        own: list[list[Prediction]] = [[] for _ in scorers]
        dealt = deal_batches(batches, self._rank, self._world, synced)
        # Samples done once every rank has scored its first n batches.
        done = list(accumulate(len(batch.indices) for batch in batches))
        for start in range(0, rounds(batches, self._world), PAUSE_BATCHES):
            pause()
            for number, batch in enumerate(dealt[start : start + PAUSE_BATCHES], start + 1):
                predictions = scorers[batch.task].score(batch.indices)
                own[batch.task] += predictions if batch.counted else []
                note(done[min(number * self._world, len(done)) - 1], done[-1])
        return own

    def _gather(self, own: list[list[Prediction]]) -> list[list[Prediction]]:
        """All ranks' predictions for each task, in file order: then sums are rounded alike for any number of ranks."""
        shares = [own]
        if self._world > 1:
            shares = [[] for _ in range(self._world)]
            dist.all_gather_object(shares, own)
        return [
            sorted(chain.from_iterable(found), key=lambda prediction: prediction.index)
            for found in zip(*shares, strict=True)
        ]
