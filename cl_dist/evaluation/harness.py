"""The live model as lm-evaluation-harness sees it. Imported only where the harness is installed and asked for."""

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

    With whole weights on every rank each one computes its share of the requests. With sharded weights (`synced`:
    ZeRO-3) every forward pass gathers them from all ranks, so all compute all requests, in step: they have the same
    numbers in the same order. To the harness every rank looks alone; all get the same results. Chat templates that
    write the date are given `date` (`train.date`).
    """

    def __init__(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, batch_size: int, synced: bool, date: str
    ) -> None:
        # The base model, since peft's generate puts back its own settings; the adapters are part of the base's layers.
        # A copy of the tokenizer, because the harness may give it another padding token.
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
        """All answers, in the requests' order, on every rank."""
        world = dist.get_world_size() if dist.is_initialized() else 1
        if world == 1 or self._synced:
            return compute(list(requests), disable_tqdm=True)
        # Consecutive pieces: the choices of one question stand together, and the harness reuses their common start.
        cuts = [len(requests) * rank // world for rank in range(world + 1)]
        rank = dist.get_rank()
        own = list(requests[cuts[rank] : cuts[rank + 1]])
        shares: list[list[Any]] = [[] for _ in range(world)]
        dist.all_gather_object(shares, compute(own, disable_tqdm=True) if own else [])
        return [answer for share in shares for answer in share]

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **options: Any) -> torch.Tensor:
        """As the harness generates; with sharded weights no rank stops before the others do."""
        if self._longest_answer is not None:
            max_length = min(max_length, self._longest_answer)
        return super()._model_generate(context, max_length, stop, synced_gpus=self._synced, **options)
