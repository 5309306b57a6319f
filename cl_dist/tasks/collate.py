"""From tokenised samples to padded tensors. Padding is on the right."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cl_dist.config.objectives import ObjectiveName
from cl_dist.tasks.objectives import OBJECTIVES
from cl_dist.tasks.plan import FILLER
from cl_dist.tasks.types import IGNORE, Encoded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MASKED_FRACTION = 0.15
KEPT_MASK_FRACTION = 0.8
RANDOM_FRACTION = 0.1
"""BERT's masking (arXiv 1810.04805): 15 % of the tokens are predicted; 80 % of these are masked, 10 % replaced and 10 %
kept."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch of B samples, padded to S input tokens (and T target tokens with an encoder-decoder)."""

    inputs: dict[str, Tensor]
    """Arguments of `model(**inputs)`, all int64: input_ids and attention_mask (B, S), decoder_input_ids (B, T)."""
    labels: Tensor
    """int64, IGNORE at positions without loss: (B, S); for an encoder-decoder (B, T), for a classifier (B,)."""
    token_masks: dict[str, Tensor]
    """bool, True at real tokens of real samples: "input" (B, S) and, for an encoder-decoder, "target" (B, T)."""
    targets: int
    """Number of positions with loss."""
    tokens: int
    """Real tokens of real samples, inputs and targets."""
    indices: list[int]
    """Each sample's position in its split; -1 for a filler."""
    keys: list[int] = field(default_factory=list)
    """During training, a number per sample that identifies its input among all inputs of the task; -1 for a filler. For
    a masked language model, a sample is a new input every time it is masked."""

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on `device`."""
        return replace(
            self,
            inputs={name: tensor.to(device) for name, tensor in self.inputs.items()},
            labels=self.labels.to(device),
            token_masks={name: mask.to(device) for name, mask in self.token_masks.items()},
        )


def gather(samples: Sequence[Encoded], indices: Sequence[int]) -> list[Encoded]:
    """The samples of a micro-batch of a `BatchPlan`. Empty places repeat one of the samples as a filler."""
    stand_in = samples[max(indices[0], 0)]
    return [samples[index] if index >= 0 else as_filler(stand_in) for index in indices]


def as_filler(sample: Encoded) -> Encoded:
    """The sample without targets and index: the model computes on it, but it never counts."""
    return replace(sample, index=FILLER, labels=[IGNORE] * len(sample.labels))


def collate(
    samples: list[Encoded], objective: ObjectiveName, pad_id: int, decoder_start_id: int | None = None
) -> Batch:
    """Pad samples to the longest of them.

    Only seq2seq_lm needs `decoder_start_id`: the decoder reads it, and then the answer except for its last token. A
    filler keeps its attention mask, since attention over nothing is NaN, but has an empty token mask.
    """
    work = OBJECTIVES[objective]
    real = torch.tensor([sample.index != FILLER for sample in samples])
    input_ids = pad([sample.input_ids for sample in samples], pad_id)
    attention = length_mask([len(sample.input_ids) for sample in samples])
    labels = pad([sample.labels for sample in samples], IGNORE)
    inputs = {"input_ids": input_ids, "attention_mask": attention.long()}
    inputs |= work.decoder_inputs(labels, pad_id, decoder_start_id)
    masks = {"input": attention & real[:, None]}
    if work.facts.answer_apart:
        masks["target"] = length_mask([len(sample.labels) for sample in samples]) & real[:, None]
    return Batch(
        inputs=inputs,
        labels=work.batch_labels(labels),
        token_masks=masks,
        targets=sum(sample.targets for sample in samples),
        tokens=sum(int(mask.sum()) for mask in masks.values()),
        indices=[sample.index for sample in samples],
    )


def pad(rows: list[list[int]], value: int) -> Tensor:
    """Rows of ids as one int64 tensor (rows, longest row), padded with `value`."""
    longest = max(map(len, rows))
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows], dtype=torch.long)


def length_mask(lengths: list[int]) -> Tensor:
    """Bool (rows, longest): True at the first `lengths[i]` places of row i."""
    return torch.arange(max(lengths))[None, :] < torch.tensor(lengths)[:, None]


def mask_tokens(batch: Batch, tokenizer: PreTrainedTokenizerBase, seed: int) -> Batch:
    """Mask a batch for masked_lm: 15 % of the candidates (labels other than IGNORE), at least one per real sample.

    The mask of a sample depends only on `seed` and the sample's index, so that a global batch is masked in the same way
    however it is split over ranks and micro-batches. Use a different seed in every step.
    """
    input_ids, labels = batch.inputs["input_ids"].clone(), torch.full_like(batch.labels, IGNORE)
    for row, index in enumerate(batch.indices):
        generator = torch.Generator().manual_seed(random.Random(f"{seed}/{index}").getrandbits(63))
        (places,) = torch.nonzero(batch.labels[row] != IGNORE, as_tuple=True)
        chosen = choose_places(places, generator)
        labels[row, chosen] = input_ids[row, chosen]
        input_ids[row, chosen] = corrupt(input_ids[row, chosen], tokenizer, generator)
    targets = int((labels != IGNORE).sum())
    return replace(batch, inputs={**batch.inputs, "input_ids": input_ids}, labels=labels, targets=targets)


def choose_places(places: Tensor, generator: torch.Generator) -> Tensor:
    """Choose from int64 (N,) the places to predict: each with a probability of 15 %, and always at least one."""
    if not len(places):
        return places
    scores = torch.rand(len(places), generator=generator)
    return places[scores <= max(MASKED_FRACTION, scores.min().item())]


def corrupt(ids: Tensor, tokenizer: PreTrainedTokenizerBase, generator: torch.Generator) -> Tensor:
    """What the model sees instead of ids (N,) that it has to predict: mask tokens, random tokens or the ids."""
    scores = torch.rand(len(ids), generator=generator)
    replacements = torch.randint(len(tokenizer), ids.shape, generator=generator)
    replaced = torch.where(scores < KEPT_MASK_FRACTION + RANDOM_FRACTION, replacements, ids)
    return replaced.masked_fill(scores < KEPT_MASK_FRACTION, int(tokenizer.mask_token_id))
