"""The live model as a model of lm-evaluation-harness. Imported only if a recipe uses the harness."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lm_eval.models.huggingface import HFLM
from torch import nn
from transformers import PreTrainedTokenizerBase

from cl_dist.models.positions import longest_inputs
from cl_dist.models.structure import base_model
from cl_dist.tasks.template import with_frozen_clock

T = TypeVar("T")


def from_first_rank(value: T) -> T:
    """Rank 0's value on every rank (collective)."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


class LiveModel(HFLM):
    """The model inside the engine, on all ranks.

    If every rank has all weights, each computes a share of the requests. With sharded weights (`synced`: ZeRO-3) every
    forward pass gathers them from all ranks, so all ranks compute all requests in the same order. The harness itself
    thinks there is a single process; all ranks get the same results. Chat templates that contain the date get `date`
    (`train.date`).
    """

    def __init__(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, batch_size: int, synced: bool, date: str
    ) -> None:
        # The base model, because peft's `generate` restores the model's own settings; the adapters are in its layers.
        # Copy the tokenizer, because the harness may change its padding token.
        own = copy.deepcopy(tokenizer)
        templates = own.chat_template
        if isinstance(templates, dict):
            own.chat_template = {name: with_frozen_clock(text, date) for name, text in templates.items()}
        elif templates:
            own.chat_template = with_frozen_clock(templates, date)
        longest = longest_inputs(model)
        super().__init__(pretrained=base_model(model), tokenizer=own, batch_size=batch_size, max_length=longest.source)
        self._synced = synced
        self._longest_answer = longest.target

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
        """Log-likelihoods of continuations."""
        return self._shared(super().loglikelihood, requests)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
        """Log-likelihoods of whole texts."""
        return self._shared(super().loglikelihood_rolling, requests)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
        """Continuations."""
        return self._shared(super().generate_until, requests)

    def _shared(self, compute: Callable[..., list[Any]], requests: Sequence[Any]) -> list[Any]:
        """Compute all requests, shared among the ranks; every rank gets all answers in the order of the requests."""
        world = dist.get_world_size() if dist.is_initialized() else 1
        if world == 1 or self._synced:
            return compute(list(requests), disable_tqdm=True)
        # Consecutive pieces keep the choices of a question together, so that the harness can reuse their common prefix.
        cuts = [len(requests) * rank // world for rank in range(world + 1)]
        rank = dist.get_rank()
        own = list(requests[cuts[rank] : cuts[rank + 1]])
        shares: list[list[Any]] = [[] for _ in range(world)]
        dist.all_gather_object(shares, compute(own, disable_tqdm=True) if own else [])
        return [answer for share in shares for answer in share]

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **options: Any) -> torch.Tensor:
        """Generate like the harness, but with sharded weights, no rank may stop before the others do."""
        if self._longest_answer is not None:
            max_length = min(max_length, self._longest_answer)
        return super()._model_generate(context, max_length, stop, synced_gpus=self._synced, **options)
