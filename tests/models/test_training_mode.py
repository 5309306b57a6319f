"""Activation checkpointing keeps the gradients, dropout is detected, and evaluation mode leaves a model unchanged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    RobertaConfig,
    T5Config,
)
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeConfig, NllbMoeTop2Router

from cl_dist.config.schema import BUILTIN_MODELS, LoraConfig
from cl_dist.errors import BadInput
from cl_dist.evaluation.inference import evaluating
from cl_dist.models.builtin import builtin_config
from cl_dist.models.lora import add_lora
from cl_dist.models.structure import block_prefixes
from cl_dist.models.training_mode import enable_activation_checkpointing, evaluation_mode, has_dropout
from tests.models.conftest import SEED, Loader

TINY = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}


def build(load: Loader, name: str, lora: bool) -> nn.Module:
    loaded = load(name)
    model = add_lora(loaded.model, LoraConfig(r=2), loaded.objective, SEED) if lora else loaded.model
    for key, parameter in model.named_parameters():
        if ".lora_B." in key:  # zero at first, which would hide A's gradient
            parameter.data.fill_(0.01)
    return model.train()


def gradients(model: nn.Module, name: str) -> dict[str, Tensor]:
    ids = torch.arange(5, 30)[None]
    extra = {"decoder_input_ids": ids[:, :3]} if "t5" in name else {}
    (model(input_ids=ids, **extra).logits ** 2).mean().backward()
    return {key: parameter.grad for key, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("name", BUILTIN_MODELS)
@pytest.mark.parametrize("lora", [False, True])
def test_blocks_are_recomputed_and_gradients_stay(load: Loader, name: str, lora: bool) -> None:
    plain, checkpointed = build(load, name, lora), build(load, name, lora)
    enable_activation_checkpointing(checkpointed)
    forwards: Counter[str] = Counter()
    blocks = [f"{prefix}{i}" for prefix in block_prefixes(checkpointed) for i in range(2)]
    for block in blocks:
        inner = next(m for m in checkpointed.get_submodule(block).modules() if isinstance(m, nn.Linear))
        inner.register_forward_hook(lambda *_, block=block: forwards.update([block]))
    expected = gradients(plain, name)
    found = gradients(checkpointed, name)
    assert forwards == dict.fromkeys(blocks, 2)
    assert set(found) == set(expected)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=3e-6)


def test_a_model_that_cannot_is_refused(load: Loader) -> None:
    model = load("builtin:llama-tiny").model
    model.supports_gradient_checkpointing = False
    with pytest.raises(BadInput, match=r"train\.activation_checkpointing: LlamaForCausalLM does not support it"):
        enable_activation_checkpointing(model)


@pytest.mark.parametrize(
    ("build", "config", "expected"),
    [
        (AutoModelForCausalLM, LlamaConfig(**TINY), False),
        (AutoModelForCausalLM, LlamaConfig(**TINY, attention_dropout=0.1), True),
        (AutoModelForSequenceClassification, RobertaConfig(**TINY, hidden_dropout_prob=0.1), True),
        (AutoModelForSequenceClassification, builtin_config("builtin:roberta-tiny"), False),
        (AutoModelForSeq2SeqLM, T5Config(vocab_size=11, d_model=8, d_ff=8, num_layers=1, num_heads=2), True),
        (AutoModelForSeq2SeqLM, builtin_config("builtin:t5-tiny"), False),
        (AutoModelForCausalLM, GPT2Config(vocab_size=11, n_embd=8, n_layer=1, n_head=2), True),
    ],
)
def test_dropout_of_the_model(build: Any, config: PreTrainedConfig, expected: bool) -> None:
    assert has_dropout(build.from_config(config)) == expected


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_dropout_of_the_adapters(dropout: float) -> None:
    model = AutoModelForCausalLM.from_config(LlamaConfig(**TINY))
    adapted = add_lora(model, LoraConfig(r=2, dropout=dropout), "causal_lm", seed=0)
    assert has_dropout(adapted) == (dropout > 0)


def test_measuring_recomputes_without_dropout(load: Loader) -> None:
    model = build(load, "builtin:llama-tiny", lora=True)
    enable_activation_checkpointing(model)
    blocks = [model.get_submodule(f"{prefix}{i}") for prefix in block_prefixes(model) for i in range(2)]
    with evaluation_mode(model):
        assert all(block.training for block in blocks)
        assert not any(part.training for block in blocks for part in block.modules() if part is not block)
        assert not model.training
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("measuring", [evaluating, evaluation_mode])
def test_a_router_keeps_its_capacity(measuring: Callable[[nn.Module], AbstractContextManager[None]]) -> None:
    config = NllbMoeConfig(d_model=8, num_experts=4, expert_capacity=64, moe_eval_capacity_token_fraction=0.5)
    router = NllbMoeTop2Router(config)
    with measuring(router):
        router(torch.randn(10, 8))
        assert router.expert_capacity == 5
    assert router.expert_capacity == 64
    assert router.training
