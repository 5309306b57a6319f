"""Built-in models and the byte tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from cl_dist.config.objectives import Family, objectives_of
from cl_dist.config.schema import BUILTIN_FAMILIES, BUILTIN_MODELS
from cl_dist.models.builtin import VOCABULARY_SIZE, builtin_config, byte_tokenizer
from tests.models.conftest import LABELS, Loader

CASES = [(name, objective) for name in BUILTIN_MODELS for objective in objectives_of(BUILTIN_FAMILIES[name])]


@given(st.text())
def test_every_text_survives_the_tokenizer(text: str) -> None:
    tokenizer = byte_tokenizer("decoder")
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert len(ids) == len(text.encode())


@pytest.mark.parametrize(
    ("family", "expected"), [("decoder", "<s>a"), ("encoder", "<s>a</s>"), ("encoder-decoder", "a</s>")]
)
def test_the_tokenizer_survives_saving_and_loading(family: Family, expected: str, tmp_path: Path) -> None:
    byte_tokenizer(family).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.decode(tokenizer("a")["input_ids"]) == expected
    assert tokenizer.decode(tokenizer("Été, <b> \n", add_special_tokens=False)["input_ids"]) == "Été, <b> \n"
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.mask_token_id) == (
        0,
        1,
        2,
        3,
    )
    assert len(tokenizer) == VOCABULARY_SIZE


def test_every_family_has_a_builtin_model() -> None:
    assert set(BUILTIN_FAMILIES) == set(BUILTIN_MODELS)
    assert set(BUILTIN_FAMILIES.values()) == set(get_args(Family))


@pytest.mark.parametrize(("name", "objective"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_builtin_model_takes_a_batch(load: Loader, name: str, objective: str, dtype: torch.dtype) -> None:
    loaded = load(name, objective, dtype=dtype)
    assert loaded.objective == objective
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {dtype}
    inputs = loaded.tokenizer(["one", "and another"], return_tensors="pt", padding=True)
    extra = {"decoder_input_ids": torch.zeros(2, 4, dtype=torch.long)} if objective == "seq2seq_lm" else {}
    logits = loaded.model(**inputs, **extra).logits
    width = LABELS if objective == "classification" else VOCABULARY_SIZE
    tokens = () if objective == "classification" else (4 if extra else inputs["input_ids"].shape[1],)
    assert logits.shape == (2, *tokens, width)
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("name", BUILTIN_MODELS)
def test_long_inputs_fit(load: Loader, name: str) -> None:
    length = {"builtin:roberta-tiny": 512}.get(name, 1024)
    loaded = load(name)
    ids = torch.full((1, length), 9)
    extra = {"decoder_input_ids": ids[:, :2]} if loaded.objective == "seq2seq_lm" else {}
    assert torch.isfinite(loaded.model(input_ids=ids, **extra).logits).all()


def test_the_llama_head_is_not_tied() -> None:
    assert builtin_config("builtin:llama-tiny").tie_word_embeddings is False
