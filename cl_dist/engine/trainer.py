"""One task's optimiser steps: which samples, collated how, into the engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import ceil
from typing import TYPE_CHECKING

import torch

from cl_dist.engine.collator import Collator
from cl_dist.engine.distributed import device
from cl_dist.engine.engine import StepResult, TrainingEngine
from cl_dist.engine.probe import Chunk, EngineProbe
from cl_dist.seeds import derive_seed
from cl_dist.tasks.collate import Batch, gather
from cl_dist.tasks.plan import FILLER, BatchPlan, Cycles, InterleavedPlan
from cl_dist.tasks.types import Encoded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from cl_dist.methods.protocol import Memory


class TaskTrainer:
    """The steps of one task; any step can be taken next, whatever was before it.

    Args:
        engine: The run's engine.
        samples: The task's encoded training samples.
        tokenizer: For the mask token of a masked language model.
        pad_id: Token that fills batches up.
        index: Position of the task in the stream.
        memory: Encoded samples of past tasks that are learnt in steps of their own, in between.
        tasks: What methods may ask about: every task's own samples, up to and with this one.
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
    ) -> None:
        self._engine, self._samples, self._index = engine, samples, index
        decoder_start = getattr(engine.model.config, "decoder_start_token_id", None)
        self._collator = Collator(engine.objective, tokenizer, pad_id, decoder_start)
        self._train = engine.recipe.train
        self._rank = torch.distributed.get_rank()
        self.cycles: Cycles | None = None
        """How steps on own samples and on the memory alternate; None without a memory."""
        epochs = engine.recipe.stream.tasks[index].epochs or self._train.epochs
        own = self._batch_plan(samples, epochs, self._train.max_steps_per_task, "order")
        self._plan: BatchPlan | InterleavedPlan = own
        if memory is not None:
            self.cycles = Cycles(own.steps, memory.inner, memory.outer, memory.last, memory.scheduled)
            self._plan = InterleavedPlan(own, self._memory_plan(memory, self.cycles), self.cycles, len(samples))
            self._samples = [*samples, *memory.samples]
        self.probe = EngineProbe(engine, self._collator, tasks, self._learnt, self._collate)
        """What methods ask about samples."""

    def _batch_plan(self, samples: Sequence[Encoded], epochs: int, max_steps: int | None, order: str) -> BatchPlan:
        return BatchPlan(
            lengths=[len(sample.input_ids) for sample in samples],
            micro_batch_size=self._train.micro_batch_size,
            gradient_accumulation=self._train.gradient_accumulation,
            ranks=torch.distributed.get_world_size(),
            epochs=epochs,
            max_steps=max_steps,
            shuffle=self._train.shuffle,
            group_by_length=self._train.group_by_length,
            seed=derive_seed(self._train.seed, order, self._index),
        )

    def _memory_plan(self, memory: Memory, cycles: Cycles) -> BatchPlan:
        """As many passes over the memory as its steps take."""
        once = self._batch_plan(memory.samples, 1, None, "memory order")
        epochs = ceil(cycles.outer_steps / once.steps_per_epoch)
        return self._batch_plan(memory.samples, epochs, cycles.outer_steps, "memory order")

    @property
    def steps(self) -> int:
        """Optimiser steps of the task."""
        return self._plan.steps

    def tokens(self, step: int) -> int:
        """Real tokens in a step's global batch, inputs and (with an encoder-decoder) targets."""
        samples = [self._samples[index] for index in self._plan.step(step)]
        return sum(map(self._collator.objective.tokens, samples))

    def samples(self, step: int) -> list[int]:
        """A step's global batch, as positions in the task's training data (what methods add comes last there)."""
        return self._plan.step(step)

    def step(self, step: int) -> StepResult:
        """Take optimiser step `step` (0-based), together with the other ranks."""
        batches = [self._collate(step, indices) for indices in self._plan.micro_batches(step, self._rank)]
        return self._engine.train_step(step, batches, self._global_targets(step, batches), self._real_batches(step))

    def _real_batches(self, step: int) -> int | None:
        """Micro-batches of all ranks that hold at least one sample; None where the loss does not ask for them."""
        if self._train.loss_average != "micro_batch":
            return None
        ranks = range(torch.distributed.get_world_size())
        return sum(max(indices) >= 0 for rank in ranks for indices in self._plan.micro_batches(step, rank))

    def _collate(self, step: int, indices: Sequence[int]) -> Batch:
        batch = self._collator(gather(self._samples, indices), derive_seed(self._train.seed, "mask", self._index, step))
        first = step * len(self._samples) if self._masks_anew else 0
        return replace(batch, keys=[index if index == FILLER else first + index for index in indices])

    @property
    def _masks_anew(self) -> bool:
        """Whether a sample is another input in every step."""
        return self._collator.objective.facts.masked

    def _learnt(self, rank: int) -> list[Chunk]:
        """A rank's inputs in the whole task, each once, in micro-batches of the run's size."""
        steps = range(self.steps)
        pieces = [(step, piece) for step in steps for piece in self._plan.micro_batches(step, rank) if max(piece) >= 0]
        if self._masks_anew:
            return pieces
        seen = list(dict.fromkeys(index for _, piece in pieces for index in piece if index != FILLER))
        size = self._train.micro_batch_size
        return [(0, seen[start : start + size]) for start in range(0, len(seen), size)]

    def _global_targets(self, step: int, batches: Sequence[Batch]) -> int:
        """Targets of the global batch; every rank can count them from the samples, but for those that masking draws."""
        if not self._masks_anew:
            return sum(self._samples[index].targets for index in self._plan.step(step))
        count = torch.tensor(sum(batch.targets for batch in batches), device=device())
        torch.distributed.all_reduce(count)
        return int(count.item())
