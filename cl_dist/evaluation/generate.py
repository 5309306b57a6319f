"""Batched greedy generation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from cl_dist.evaluation.batches import pad_side
from cl_dist.evaluation.wrapped import device_of
from cl_dist.models.structure import base_model


class Generated(NamedTuple):
    """What a model has answered."""

    ids: list[int]
    """Up to and with the token that ended it."""
    cut: bool
    """Whether it was ended by `max_new_tokens`."""


def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    pad_id: int,
    max_new_tokens: int,
    synced: bool,
    stops: Sequence[int] = (),
) -> list[Generated]:
    """The greedy continuation of each prompt, or an encoder-decoder's answer to it.

    A sequence ends at one of `stops` (by default the tokenizer's end of sequence token) or after `max_new_tokens`.
    `synced` keeps all ranks in step until the last one is done, which ZeRO-3 needs; every rank must then call this
    equally often.
    """
    base: Any = base_model(model)
    ends = list(stops) or [tokenizer.eos_token_id]
    is_decoder = not base.config.is_encoder_decoder
    input_ids, mask = pad_side(prompts, pad_id, "left" if is_decoder else "right", device_of(model))
    with _own_settings(base, greedy(base, tokenizer, pad_id, max_new_tokens, ends)):
        # The base model, since peft's generate puts back its own settings; the adapters are part of the base's layers.
        sequences: torch.Tensor = base.generate(input_ids, attention_mask=mask, synced_gpus=synced)
    start = input_ids.shape[1] if is_decoder else 1
    return [_until(row, ends) for row in sequences[:, start:].tolist()]


def _until(ids: list[int], ends: Sequence[int]) -> Generated:
    """A row of a batch without what stands behind its end."""
    end = next((place for place, token in enumerate(ids) if token in ends), None)
    return Generated(ids if end is None else ids[: end + 1], cut=end is None)


def greedy(
    base: Any, tokenizer: PreTrainedTokenizerBase, pad_id: int, max_new_tokens: int, ends: Sequence[int]
) -> GenerationConfig:
    """Settings of greedy decoding; sampling, beams, penalties and lengths that came with the model play no part."""
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        use_cache=True,
        pad_token_id=pad_id,
        eos_token_id=list(ends),
        bos_token_id=tokenizer.bos_token_id,
        decoder_start_token_id=getattr(base.config, "decoder_start_token_id", None),
    )


@contextmanager
def _own_settings(base: Any, settings: GenerationConfig) -> Iterator[None]:
    """The model's generation settings are `settings` inside: given as an argument they would be merged with the
    model's.
    """
    before = base.generation_config
    base.generation_config = settings
    try:
        yield
    finally:
        base.generation_config = before
