"""Padding, fillers and masking."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cl_dist.tasks.collate import Batch, collate, gather, mask_tokens
from cl_dist.tasks.plan import FILLER
from cl_dist.tasks.types import IGNORE, Encoded
from tests.tasks.tiny_tokenizers import MASK, characters, ids

PAD = 0


def tokens(batch: Batch, name: str = "input_ids") -> list[list[int]]:
    """One of the inputs as lists."""
    rows: list[list[int]] = batch.inputs[name].tolist()
    return rows


def test_causal_batch_is_padded_on_the_right() -> None:
    samples = [Encoded(3, [5, 6, 7], [IGNORE, 6, 7]), Encoded(8, [9], [IGNORE])]
    batch = collate(samples, "causal_lm", PAD)
    assert tokens(batch) == [[5, 6, 7], [9, PAD, PAD]]
    assert tokens(batch, "attention_mask") == [[1, 1, 1], [1, 0, 0]]
    assert batch.labels.tolist() == [[IGNORE, 6, 7], [IGNORE] * 3]
    assert batch.token_masks["input"].tolist() == [[True] * 3, [True, False, False]]
    assert (batch.targets, batch.tokens, batch.indices) == (2, 4, [3, 8])
    assert set(batch.inputs) == {"input_ids", "attention_mask"}


def test_seq2seq_batch_shifts_the_decoder() -> None:
    samples = [Encoded(0, [5, 6], [7, 8, 1]), Encoded(1, [5], [9])]
    batch = collate(samples, "seq2seq_lm", PAD, decoder_start_id=2)
    assert batch.labels.tolist() == [[7, 8, 1], [9, IGNORE, IGNORE]]
    assert tokens(batch, "decoder_input_ids") == [[2, 7, 8], [2, 9, PAD]]
    assert batch.token_masks["target"].tolist() == [[True] * 3, [True, False, False]]
    assert (batch.targets, batch.tokens) == (4, 7)


def test_seq2seq_needs_a_start_token() -> None:
    with pytest.raises(ValueError, match="decoder_start_id"):
        collate([Encoded(0, [5], [7])], "seq2seq_lm", PAD)


def test_classification_batch_has_one_label_a_sample() -> None:
    batch = collate([Encoded(0, [5, 6], [2]), Encoded(1, [5], [0])], "classification", PAD)
    assert batch.labels.tolist() == [2, 0]
    assert batch.targets == 2


@pytest.mark.parametrize(
    ("objective", "labels"), [("causal_lm", [IGNORE, 6]), ("seq2seq_lm", [7, 8]), ("classification", [1])]
)
def test_fillers_are_computed_but_never_count(objective: Any, labels: list[int]) -> None:
    samples = [Encoded(0, [5, 6], labels)]
    alone = collate(gather(samples, [0]), objective, PAD, 2)
    batch = collate(gather(samples, [0, FILLER]), objective, PAD, 2)
    assert (batch.targets, batch.tokens, batch.indices) == (alone.targets, alone.tokens, [0, FILLER])
    assert tokens(batch, "attention_mask")[1] == [1, 1]
    assert not any(mask[1].any() for mask in batch.token_masks.values())
    assert (batch.labels[1] == IGNORE).all()


def test_micro_batch_of_fillers_alone() -> None:
    batch = collate(gather([Encoded(0, [5, 6], [IGNORE, 6])], [FILLER, FILLER]), "causal_lm", PAD)
    assert (batch.targets, batch.tokens) == (0, 0)
    assert batch.inputs["input_ids"].shape == (2, 2)


def masked_batch(indices: list[int], seed: int = 0, length: int = 400) -> Batch:
    """A masked batch of samples between BOS and EOS; sample i is all one letter."""
    samples = [
        Encoded(i, [1, *ids(chr(97 + i) * length), 2], [IGNORE, *ids(chr(97 + i) * length), IGNORE]) for i in range(5)
    ]
    return mask_tokens(collate(gather(samples, indices), "masked_lm", PAD), characters(), seed)


def test_masking_hides_fifteen_percent_and_keeps_the_rest() -> None:
    batch = masked_batch(list(range(5)), length=4000)
    chosen = batch.labels != IGNORE
    assert batch.targets == int(chosen.sum())
    assert 0.14 < batch.targets / 20_000 < 0.16
    inputs = batch.inputs["input_ids"]
    masked, kept = inputs[chosen] == MASK, inputs[chosen] == batch.labels[chosen]
    assert 0.77 < masked.float().mean() < 0.83
    assert 0.08 < kept.float().mean() < 0.13
    originals = torch.tensor([[1, *ids(chr(97 + i) * 4000), 2] for i in range(5)])
    assert torch.equal(inputs[~chosen], originals[~chosen])
    assert torch.equal(batch.labels[chosen], originals[chosen])


def test_masking_depends_on_seed_and_sample_not_on_its_place() -> None:
    whole, part = masked_batch([0, 1, 2, 3]), masked_batch([2, 3])
    assert torch.equal(whole.inputs["input_ids"][2:], part.inputs["input_ids"])
    assert torch.equal(whole.labels[2:], part.labels)
    assert not torch.equal(masked_batch([0], seed=1).labels, masked_batch([0]).labels)


def test_masking_leaves_no_sample_without_a_target_and_no_filler_with_one() -> None:
    for seed in range(20):
        batch = masked_batch([0, 1, FILLER], seed, length=2)
        assert [bool((row != IGNORE).any()) for row in batch.labels] == [True, True, False]
        assert (batch.labels[:, [0, 3]] == IGNORE).all()
