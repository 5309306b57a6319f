"""Feeds one task to the engine: samples become micro-batches, and micro-batches become optimiser steps.

Methods may ask for gradients and predictions on samples of their choice, which `EngineProbe` answers between steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import ceil
from typing import TYPE_CHECKING

import torch

from cl_dist.config.objectives import ObjectiveName
from cl_dist.engine.device import device
from cl_dist.engine.engine import StepResult, TrainingEngine
from cl_dist.heartbeat import beat
from cl_dist.methods.protocol import Probe
from cl_dist.seeds import derive_seed
from cl_dist.tasks.collate import Batch, as_filler, collate, gather
from cl_dist.tasks.objectives import OBJECTIVES
from cl_dist.tasks.plan import FILLER, BatchPlan, Cycles, InterleavedPlan, share
from cl_dist.tasks.samples import Samples, as_samples, join
from cl_dist.tasks.types import Encoded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from cl_dist.methods.protocol import Memory

Chunk = tuple[int, list[int]]
"""A micro-batch as a step number and sample numbers."""


class Collator:
    """Collates samples into micro-batches for one model.

    Args:
        objective: The training objective.
        tokenizer: Supplies the mask token of a masked language model.
        pad_id: Padding token.
        decoder_start_id: The first token that an encoder-decoder's decoder reads.
    """

    def __init__(
        self, objective: ObjectiveName, tokenizer: PreTrainedTokenizerBase, pad_id: int, decoder_start_id: int | None
    ) -> None:
        self.objective = OBJECTIVES[objective]
        self._tokenizer, self._pad_id, self._decoder_start_id = tokenizer, pad_id, decoder_start_id

    def __call__(self, samples: Sequence[Encoded], mask_seed: int) -> Batch:
        """Collate one micro-batch; `mask_seed` decides which tokens a masked language model has to predict."""
        batch = collate(list(samples), self.objective.name, self._pad_id, decoder_start_id=self._decoder_start_id)
        return self.objective.pose(batch, self._tokenizer, mask_seed)

    def filler(self, like: Encoded) -> Batch:
        """The shortest possible micro-batch without targets, made of `like`'s first tokens."""
        ids = (like.input_ids * 2)[:2]  # two, because a decoder's first token predicts the second
        labels = self.objective.made_up_labels(ids, like.labels[:1])
        return self([as_filler(Encoded(like.index, ids, labels))], mask_seed=0)

    def targets(self, all_targets: int, batches: Sequence[Batch]) -> int:
        """Targets of samples that this rank's `batches` and those of the other ranks hold between them.

        Every rank knows the samples' own `all_targets`. Only with a masked language model, whose masks are drawn per
        rank, are the batches' targets summed over the ranks (collective).
        """
        if not self.objective.facts.masked:
            return all_targets
        count = torch.tensor(sum(batch.targets for batch in batches), device=device())
        torch.distributed.all_reduce(count)
        return int(count.item())


class EngineProbe(Probe):
    """A `Probe` that runs samples through the training engine.

    Args:
        engine: The run's engine.
        collator: Collates samples into micro-batches.
        tasks: The training samples of all tasks so far, the current task last.
        learnt: Returns the inputs of a rank in the current task, each once, in micro-batches.
        collate: Collates a chunk as training does.
        data: The data sets that methods name, by setting.
    """

    def __init__(
        self,
        engine: TrainingEngine,
        collator: Collator,
        tasks: Sequence[Sequence[Encoded]],
        learnt: Callable[[int], list[Chunk]],
        collate: Callable[[int, list[int]], Batch],
        data: Mapping[str, Sequence[Encoded]] | None = None,
    ) -> None:
        self.tasks, self.data = tasks, data or {}
        self._engine, self._collator, self._learnt, self._collate = engine, collator, learnt, collate
        self._rank, self._world = torch.distributed.get_rank(), torch.distributed.get_world_size()

    def gradient(self, samples: Sequence[Encoded], take: Callable[[], None], *, mean: bool, what: str) -> bool:
        """See `Probe`."""
        # Spread the samples over the ranks, and over the micro-batches of one step. Where there are too few of them,
        # fillers keep every rank's passes, and with them the collectives, the same.
        pieces = self._engine.recipe.train.gradient_accumulation
        own = share(list(range(len(samples))), self._world, self._rank)
        chosen = [[samples[number] for number in share(own, pieces, piece)] for piece in range(pieces)]
        seed = derive_seed(self._engine.recipe.train.seed, "mask", len(self.tasks), what)
        batches = [self._collator(some, seed) if some else self._collator.filler(samples[0]) for some in chosen]
        targets = self._collator.targets(sum(sample.targets for sample in samples), batches) if mean else 1
        return self._engine.measure(batches, targets, what, take)

    def responses(self, take: Callable[[Batch, torch.Tensor, torch.Tensor], None]) -> None:
        """See `Probe`."""
        chunks = self._learnt(self._rank)
        # Sharded weights demand that all ranks run the model equally often.
        rounds = torch.tensor(len(chunks), device=device())
        torch.distributed.all_reduce(rounds, torch.distributed.ReduceOp.MAX)
        for step, indices in chunks + [(0, [FILLER])] * (int(rounds.item()) - len(chunks)):
            batch = self._collate(step, indices).to(device())
            take(batch, *self._engine.predict(batch))
            beat()

    def each(self, samples: Sequence[Encoded], take: Callable[[int], None]) -> None:
        """See `Probe`."""
        for first in range(0, len(samples), self._world):
            own = first + self._rank
            sample = samples[own if own < len(samples) else first]
            self._engine.predict(self._collator([sample], mask_seed=0).to(device()))
            take(min(self._world, len(samples) - first))
            beat()


class TaskTrainer:
    """The optimiser steps of one task. Each step depends on its number alone, so training can resume at any of them.

    Args:
        engine: The run's engine.
        samples: The task's encoded training samples.
        tokenizer: Supplies the mask token of a masked language model.
        pad_id: Padding token.
        index: Position of the task in the stream.
        memory: Encoded samples of past tasks, trained on in separate steps between the task's own.
        tasks: The training samples of all tasks so far, which methods can probe.
        data: The data sets that methods name, by setting.
    """

    def __init__(
        self,
        engine: TrainingEngine,
        samples: Sequence[Encoded],
        tokenizer: PreTrainedTokenizerBase,
        pad_id: int,
        index: int,
        memory: Memory | None = None,
        tasks: Sequence[Sequence[Encoded]] = (),
        data: Mapping[str, Sequence[Encoded]] | None = None,
    ) -> None:
        self._engine, self._samples, self._index = engine, as_samples(samples), index
        decoder_start = getattr(engine.model.config, "decoder_start_token_id", None)
        self._collator = Collator(engine.objective, tokenizer, pad_id, decoder_start)
        self._train = engine.recipe.train
        self._rank = torch.distributed.get_rank()
        self.cycles: Cycles | None = None
        """How steps on the task's own samples and on the memory alternate; None without a memory."""
        epochs = engine.recipe.stream.tasks[index].epochs or self._train.epochs
        own = self._batch_plan(self._samples, epochs, self._train.max_steps_per_task, "order")
        self._plan: BatchPlan | InterleavedPlan = own
        if memory is not None:
            self.cycles = Cycles(own.steps, memory.inner, memory.outer, memory.last, memory.scheduled)
            # The plan of the memory has as many passes over it as its steps take.
            past = as_samples(memory.samples)
            once = self._batch_plan(past, 1, None, "memory order")
            passes = ceil(self.cycles.outer_steps / once.steps_per_epoch)
            outer = self._batch_plan(past, passes, self.cycles.outer_steps, "memory order")
            self._plan = InterleavedPlan(own, outer, self.cycles, len(self._samples))
            self._samples = join([self._samples, past])
        self.probe = EngineProbe(engine, self._collator, tasks, self._learnt, self._collate, data)

    def _batch_plan(self, samples: Samples, epochs: int, max_steps: int | None, order: str) -> BatchPlan:
        return BatchPlan(
            lengths=samples.lengths.tolist(),
            micro_batch_size=self._train.micro_batch_size,
            gradient_accumulation=self._train.gradient_accumulation,
            ranks=torch.distributed.get_world_size(),
            epochs=epochs,
            max_steps=max_steps,
            shuffle=self._train.shuffle,
            group_by_length=self._train.group_by_length,
            seed=derive_seed(self._train.seed, order, self._index),
        )

    @property
    def steps(self) -> int:
        """Optimiser steps of the task."""
        return self._plan.steps

    def tokens(self, step: int) -> int:
        """Real tokens in the global batch of a step: inputs and, for an encoder-decoder, targets."""
        chosen, samples = self._plan.step(step), self._samples
        inputs, labels = int(samples.lengths[chosen].sum()), int(samples.label_lengths[chosen].sum())
        return self._collator.objective.tokens(inputs, labels)

    def samples(self, step: int) -> list[int]:
        """The global batch of a step, as positions in the task's training data (samples that methods add come last)."""
        return self._plan.step(step)

    def step(self, step: int) -> StepResult:
        """Take optimiser step `step` (0-based), together with the other ranks."""
        batches = [self._collate(step, indices) for indices in self._plan.micro_batches(step, self._rank)]
        targets = self._collator.targets(int(self._samples.targets[self._plan.step(step)].sum()), batches)

        # A mean of the micro-batches' means must not count those that hold fillers only.
        real_batches = None
        if self._train.loss_average == "micro_batch":
            real_batches = self._plan.filled(step)
        return self._engine.train_step(step, batches, targets, real_batches)

    def _collate(self, step: int, indices: Sequence[int]) -> Batch:
        batch = self._collator(gather(self._samples, indices), derive_seed(self._train.seed, "mask", self._index, step))
        first = step * len(self._samples) if self._masks_anew else 0
        return replace(batch, keys=[index if index == FILLER else first + index for index in indices])

    @property
    def _masks_anew(self) -> bool:
        """Whether a sample becomes a different input in every step."""
        return self._collator.objective.facts.masked

    def _learnt(self, rank: int) -> list[Chunk]:
        """The inputs of a rank in the whole task, each once, in micro-batches of the run's size."""
        steps = range(self.steps)
        pieces = [(step, piece) for step in steps for piece in self._plan.micro_batches(step, rank) if max(piece) >= 0]
        if self._masks_anew:
            return pieces
        seen = list(dict.fromkeys(index for _, piece in pieces for index in piece if index != FILLER))
        size = self._train.micro_batch_size
        return [(0, seen[start : start + size]) for start in range(0, len(seen), size)]
