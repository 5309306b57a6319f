"""The longest input, from the configuration and from position tables. tests/zoo tries the models' own code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    NystromformerConfig,
    NystromformerForMaskedLM,
)

from cl_dist.config.schema import LoraConfig
from cl_dist.models.lora import add_lora
from cl_dist.models.position_settings import Positions, configured_positions
from cl_dist.models.positions import longest_inputs

CONFIGURED: list[tuple[dict[str, Any], Positions]] = [
    ({"model_type": "gpt2", "n_positions": 96}, Positions(96)),
    ({"model_type": "opt", "max_position_embeddings": 128}, Positions(128)),
    ({"model_type": "mpt", "max_seq_len": 64}, Positions(64)),
    ({"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 1}, Positions(512)),
    ({"model_type": "mpnet", "max_position_embeddings": 514, "pad_token_id": 0}, Positions(512)),
    ({"model_type": "bart", "max_position_embeddings": 99, "is_encoder_decoder": True}, Positions(99, 99)),
    (
        {"model_type": "led", "max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 32},
        Positions(64, 32),
    ),
    ({"model_type": "deberta-v2", "max_position_embeddings": 64}, Positions(64)),
    ({"model_type": "deberta-v2", "max_position_embeddings": 64, "position_biased_input": False}, Positions()),
    ({"model_type": "llama", "max_position_embeddings": 64}, Positions()),
    ({"model_type": "t5", "n_positions": 512, "is_encoder_decoder": True}, Positions()),
    ({"model_type": "some", "text_config": {"model_type": "gpt2", "n_positions": 7}}, Positions(7)),
    ({"model_type": "gpt2"}, Positions()),
    ({"model_type": "gpt2", "n_positions": "many"}, Positions()),
    ({"model_type": "gpt2", "n_positions": True}, Positions()),
    ({}, Positions()),
]


@pytest.mark.parametrize(("config", "expected"), CONFIGURED, ids=[str(config)[:50] for config, _ in CONFIGURED])
def test_a_configuration_gives_the_number_of_positions(config: dict[str, Any], expected: Positions) -> None:
    assert configured_positions(config) == expected


class OwnConfig(GPT2Config):
    """An unknown model type, as in a model that brings its own code."""

    model_type = "own"


def tiny_gpt2(config: type[GPT2Config] = GPT2Config) -> GPT2LMHeadModel:
    return GPT2LMHeadModel(config(vocab_size=90, n_embd=8, n_layer=1, n_head=2, n_positions=48))


def test_a_table_with_an_uncommon_name_is_recognised_by_its_size() -> None:
    model = tiny_gpt2(OwnConfig)
    model.transformer.where = model.transformer.wpe
    del model.transformer.wpe
    assert longest_inputs(model) == Positions(48)
    model.transformer.where = nn.Embedding(32, 8)  # for example, buckets of distances
    assert longest_inputs(model) == Positions()


def test_a_table_smaller_than_configured_decides() -> None:
    model = tiny_gpt2()
    model.transformer.wpe = nn.Embedding(40, 8)
    assert longest_inputs(model) == Positions(40)


def test_encoder_and_decoder_have_separate_tables() -> None:
    config = BartConfig(
        vocab_size=90, d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=8, decoder_ffn_dim=8, max_position_embeddings=64,
    )  # fmt: skip
    model = BartForConditionalGeneration(config)
    assert longest_inputs(model) == Positions(64, 64)
    model.model.decoder.embed_positions = type(model.model.decoder.embed_positions)(20, 8)
    assert longest_inputs(model) == Positions(64, 20)


def test_unused_rows_of_a_table_do_not_count() -> None:
    """Nystromformer's table has two more rows than there are positions."""
    config = NystromformerConfig(
        vocab_size=90, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        max_position_embeddings=16, segment_means_seq_len=16, num_landmarks=16, conv_kernel_size=3,
    )  # fmt: skip
    model = NystromformerForMaskedLM(config).eval()
    assert model.nystromformer.embeddings.position_embeddings.num_embeddings == 18
    assert longest_inputs(model) == Positions(16) == configured_positions(config.to_dict())
    model(torch.ones(1, 16, dtype=torch.int64))
    with pytest.raises(RuntimeError):
        model(torch.ones(1, 17, dtype=torch.int64))


def test_adapters_change_nothing() -> None:
    model = add_lora(tiny_gpt2(), LoraConfig(r=2), "causal_lm", 1)
    assert longest_inputs(model) == Positions(48)
