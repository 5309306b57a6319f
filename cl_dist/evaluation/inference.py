"""Inference with a model that may be wrapped by peft and sharded by DeepSpeed.

What label scoring, generation, perplexity and the harness share: evaluation mode, devices, padding; and batched greedy
generation.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from cl_dist.heartbeat import beat
from cl_dist.models.structure import base_model
from cl_dist.models.training_mode import kept_capacities
from cl_dist.tasks.collate import length_mask, pad


def accepts(model: nn.Module, argument: str) -> bool:
    """Whether the transformers model's `forward` has this argument."""
    return argument in inspect.signature(type(base_model(model)).forward).parameters


def device_of(model: nn.Module) -> torch.device:
    """The device for inputs; a sharded parameter knows its device even while it is empty."""
    return next(model.parameters()).device


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout and no gradients inside the block; afterwards every module is back in its previous mode."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    # Every forward pass counts as progress for the watchdog: a long answer takes many.
    marks = base_model(model).register_forward_pre_hook(lambda *_: beat())
    try:
        # Not `inference_mode`: ZeRO-3 keeps the tensors it gathers, and inference tensors cannot be trained.
        with torch.no_grad(), kept_capacities(model):
            yield
    finally:
        marks.remove()
        for module in training:
            module.training = True


def pad_side(
    sequences: Sequence[Sequence[int]], pad_id: int, side: Literal["left", "right"], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, both int64 of shape (sequences, longest), padded on the given side."""
    real = length_mask([len(sequence) for sequence in sequences]).long()
    if side == "right":
        return pad([list(sequence) for sequence in sequences], pad_id).to(device), real.to(device)
    backwards = pad([list(reversed(sequence)) for sequence in sequences], pad_id)
    return backwards.flip(1).to(device), real.flip(1).to(device)


class Generated(NamedTuple):
    """A generated answer."""

    ids: list[int]
    """Token ids, including the one that ended the answer."""
    cut: bool
    """Whether it was cut at `max_new_tokens`."""


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
    `synced` keeps all ranks running until the last one is done, as ZeRO-3 requires; all ranks must then call this the
    same number of times.
    """
    base: Any = base_model(model)
    ends = list(stops) or [tokenizer.eos_token_id]
    is_decoder = not base.config.is_encoder_decoder
    input_ids, mask = pad_side(prompts, pad_id, "left" if is_decoder else "right", device_of(model))
    with _own_settings(base, greedy(base.config, tokenizer, pad_id, max_new_tokens, ends)):
        # The base model, because peft's `generate` restores the model's own settings; the adapters are in its layers.
        sequences: torch.Tensor = base.generate(input_ids, attention_mask=mask, synced_gpus=synced)
    start = input_ids.shape[1] if is_decoder else 1
    # Drop what the batch has after the end of each answer.
    answers = []
    for ids in sequences[:, start:].tolist():
        end = next((place for place, token in enumerate(ids) if token in ends), None)
        answers.append(Generated(ids if end is None else ids[: end + 1], cut=end is None))
    return answers


def greedy(
    config: Any, tokenizer: PreTrainedTokenizerBase, pad_id: int, max_new_tokens: int, ends: Sequence[int]
) -> GenerationConfig:
    """Settings of greedy decoding for a model of this configuration; its own sampling, beams, penalties and lengths are
    ignored.
    """
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        use_cache=True,
        pad_token_id=pad_id,
        eos_token_id=list(ends),
        bos_token_id=tokenizer.bos_token_id,
        decoder_start_token_id=getattr(config, "decoder_start_token_id", None),
    )


@contextmanager
def _own_settings(base: Any, settings: GenerationConfig) -> Iterator[None]:
    """Replace the model's generation settings inside the block; passed as an argument, they would be merged."""
    before = base.generation_config
    base.generation_config = settings
    try:
        yield
    finally:
        base.generation_config = before
