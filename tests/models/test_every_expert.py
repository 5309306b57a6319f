"""Experts that are modules of their own: all of them run, and what comes out is what transformers computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import NllbMoeConfig, NllbMoeForConditionalGeneration, SwitchTransformersConfig
from transformers import SwitchTransformersForConditionalGeneration as Switch

from cl_dist.models.builtin import VOCABULARY_SIZE, byte_tokenizer
from cl_dist.models.every_expert import module_experts
from tests.models.conftest import Loader

IDS = {"vocab_size": VOCABULARY_SIZE, "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}


def switch() -> nn.Module:
    return Switch(
        SwitchTransformersConfig(**IDS, d_model=16, d_kv=8, d_ff=12, num_layers=2, num_decoder_layers=2, num_heads=2,
                                 num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, num_experts=4)
    )  # fmt: skip


def nllb() -> nn.Module:
    return NllbMoeForConditionalGeneration(
        NllbMoeConfig(**IDS, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
                      decoder_attention_heads=2, encoder_ffn_dim=12, decoder_ffn_dim=12, num_experts=4,
                      encoder_sparse_step=2, decoder_sparse_step=2, max_position_embeddings=64)
    )  # fmt: skip


@pytest.mark.parametrize("make", [switch, nllb])
def test_a_loaded_model_runs_every_expert(make: Any, load: Loader, tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = make().eval()
    made.save_pretrained(tmp_path)
    byte_tokenizer("encoder-decoder").save_pretrained(tmp_path)
    model = load(str(tmp_path), "seq2seq_lm").model.eval()

    ran = set()
    inside = module_experts(model)
    experts = {name: each for name, each in model.named_modules() if name.rpartition(".")[0] + "." in inside}
    experts = {name: each for name, each in experts.items() if "expert_" in name.rpartition(".")[2]}
    for name, expert in experts.items():
        expert.register_forward_hook(lambda *_, name=name: ran.add(name))
    tokens = {"input_ids": torch.tensor([[9]]), "decoder_input_ids": torch.tensor([[0]])}
    with torch.no_grad():
        theirs, ours = made(**tokens).logits, model(**tokens).logits

    assert len(experts) == 2 * 4  # encoder and decoder
    assert ran == set(experts)
    assert torch.equal(ours, theirs)
