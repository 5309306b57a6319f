"""Perplexity: how likely the model finds text, token by token.

Perplexity is `exp(-sum of log-likelihoods / number of target tokens)` over a whole task; lower is better. The accuracy
matrix and its metrics take higher for better, so the matrix holds the mean log-likelihood per token,
`-log(perplexity)`, and the perplexity stands beside it. Under masked LM it is the pseudo-perplexity of tokens masked as
in training; the same ones at every evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from cl_dist.evaluation.likelihood import log_probabilities
from cl_dist.evaluation.wrapped import device_of
from cl_dist.tasks.collate import Batch, collate, mask_tokens
from cl_dist.tasks.encode import Objective
from cl_dist.tasks.types import IGNORE, Encoded

MASK_SEED = 0
"""Seed of the evaluation's masks, whatever the run's own is: runs of all seeds are scored on the same tokens."""


def text_batch(
    samples: Sequence[Encoded], objective: Objective, tokenizer: PreTrainedTokenizerBase, pad_id: int
) -> Batch:
    """A padded batch of text, masked for masked_lm; which tokens are masked depends on the samples' indices alone."""
    batch = collate(list(samples), objective, pad_id)
    return mask_tokens(batch, tokenizer, MASK_SEED) if objective == "masked_lm" else batch


def log_likelihoods(model: nn.Module, batch: Batch, shifted: bool) -> list[tuple[float, int]]:
    """Of each sample the sum of its targets' log-likelihoods in nats and their number.

    `shifted` is for decoders, whose target at a position is predicted by the position before.
    """
    device = device_of(model)
    logits = model(**{name: tensor.to(device) for name, tensor in batch.inputs.items()}).logits
    targets = batch.labels.to(device)
    if shifted:
        logits, targets = logits[:, :-1], targets[:, 1:]
    sums = log_probabilities(logits, targets).sum(1, dtype=torch.float64)
    return list(zip(sums.tolist(), (targets != IGNORE).sum(1).tolist(), strict=True))


def perplexity(log_likelihood: float) -> float:
    """Perplexity from the mean log-likelihood per token; infinite where it is beyond floating point."""
    try:
        return math.exp(-log_likelihood)
    except OverflowError:
        return math.inf
