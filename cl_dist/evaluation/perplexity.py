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

from cl_dist.config.objectives import ObjectiveName
from cl_dist.evaluation.likelihood import log_probabilities
from cl_dist.evaluation.wrapped import device_of
from cl_dist.tasks.collate import Batch, collate
from cl_dist.tasks.objectives import OBJECTIVES
from cl_dist.tasks.types import IGNORE, Encoded

MASK_SEED = 0
"""Seed of the evaluation's masks, whatever the run's own is: runs of all seeds are scored on the same tokens."""


def text_batch(
    samples: Sequence[Encoded], objective: ObjectiveName, tokenizer: PreTrainedTokenizerBase, pad_id: int
) -> Batch:
    """A padded batch of text, posed as in training; what is masked depends on the samples' indices alone."""
    return OBJECTIVES[objective].pose(collate(list(samples), objective, pad_id), tokenizer, MASK_SEED)


def log_likelihoods(model: nn.Module, batch: Batch, objective: ObjectiveName) -> list[tuple[float, int]]:
    """Of each sample the sum of its targets' log-likelihoods in nats and their number."""
    device = device_of(model)
    logits = model(**{name: tensor.to(device) for name, tensor in batch.inputs.items()}).logits
    logits, targets = OBJECTIVES[objective].aligned(logits, batch.labels.to(device))
    sums = log_probabilities(logits, targets).sum(1, dtype=torch.float64)
    return list(zip(sums.tolist(), (targets != IGNORE).sum(1).tolist(), strict=True))


def perplexity(log_likelihood: float) -> float:
    """Perplexity from the mean log-likelihood per token; infinite where it is beyond floating point."""
    try:
        return math.exp(-log_likelihood)
    except OverflowError:
        return math.inf
