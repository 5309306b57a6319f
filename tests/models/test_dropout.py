from __future__ import annotations

from typing import Any

import pytest
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

from cl_dist.config.schema import LoraConfig
from cl_dist.models.builtin import builtin_config
from cl_dist.models.dropout import has_dropout
from cl_dist.models.lora import add_lora

TINY = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}


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
