"""Adapters: the layers that get one, their initial values, and what is trained."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from transformers import XLMConfig, XLMForSequenceClassification

from cl_dist.config.schema import BUILTIN_MODELS, LoraConfig
from cl_dist.errors import BadInput
from cl_dist.models.lora import add_lora
from tests.models.conftest import SEED, Loader

PARTS = {
    "builtin:llama-tiny": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "builtin:t5-tiny": {"q", "k", "v", "o", "wi", "wo"},
    "builtin:roberta-tiny": {"query", "key", "value", "dense"},
}


def adapted(load: Loader, name: str, objective: str = "auto", seed: int = SEED, **lora: object) -> PeftModel:
    loaded = load(name, objective)
    return add_lora(loaded.model, LoraConfig(**lora), loaded.objective, seed)  # type: ignore[arg-type]


def trained_names(model: PeftModel) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


@pytest.mark.parametrize("name", BUILTIN_MODELS)
def test_all_linear_is_every_layer_but_the_head(load: Loader, name: str) -> None:
    names = trained_names(adapted(load, name))
    pairs = [name for name in names if ".lora_A." in name or ".lora_B." in name]
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in pairs} == PARTS[name]
    assert not any("lm_head" in name or "classifier" in name for name in pairs)
    heads = set(names) - set(pairs)
    if name == "builtin:roberta-tiny":
        assert all(".classifier.modules_to_save.default." in name for name in heads)
        assert len(heads) == 4
    else:
        assert not heads


def test_a_head_unknown_to_peft_is_trained() -> None:
    """peft looks for `classifier` and `score`; XLM's head has another name, and would stay frozen at random values."""
    config = XLMConfig(vocab_size=30, emb_dim=16, n_layers=1, n_heads=2, num_labels=3)
    model = add_lora(XLMForSequenceClassification(config), LoraConfig(r=2), "classification", SEED)
    heads = {name for name in trained_names(model) if ".lora_" not in name}
    assert heads == {
        f"base_model.model.sequence_summary.modules_to_save.default.summary.{part}" for part in ("weight", "bias")
    }


def test_the_masked_lm_head_gets_no_adapter(load: Loader) -> None:
    names = trained_names(adapted(load, "builtin:roberta-tiny", "masked_lm"))
    assert names
    assert not any("lm_head" in name for name in names)


def test_only_the_named_layers_get_an_adapter(load: Loader) -> None:
    names = trained_names(adapted(load, "builtin:llama-tiny", target_modules=("layers.1.mlp.up_proj", "q_proj")))
    assert {name.split(".lora_")[0].removeprefix("base_model.model.model.layers.") for name in names} == {
        "0.self_attn.q_proj",
        "1.self_attn.q_proj",
        "1.mlp.up_proj",
    }


@pytest.mark.parametrize("targets", [("q_proj", "nothing"), ("_proj",), ("embed_tokens",), ("layers",), ()])
def test_unknown_layers_are_refused(load: Loader, targets: tuple[str, ...]) -> None:
    with pytest.raises(BadInput, match=r"allowed are all-linear or a list of q_proj, k_proj, .*, lm_head") as error:
        adapted(load, "builtin:llama-tiny", target_modules=targets)
    assert str(error.value).startswith("model.lora.target_modules: the model has no linear layer ")


@pytest.mark.parametrize("name", BUILTIN_MODELS)
def test_an_untrained_adapter_changes_nothing(load: Loader, name: str) -> None:
    plain, changed = load(name).model.eval(), adapted(load, name).eval()
    ids = torch.arange(5, 30)[None]
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids[:, :3]} if "t5" in name else {})
    torch.testing.assert_close(changed(**inputs).logits, plain(**inputs).logits, rtol=1e-4, atol=1e-5)


def test_adapters_follow_from_the_seed(load: Loader) -> None:
    torch.manual_seed(0)
    first = dict(adapted(load, "builtin:llama-tiny").named_parameters())
    torch.manual_seed(1)
    second = dict(adapted(load, "builtin:llama-tiny").named_parameters())
    other = dict(adapted(load, "builtin:llama-tiny", seed=SEED + 1).named_parameters())
    assert all(torch.equal(first[name], second[name]) for name in first)
    matrices = [name for name in first if ".lora_A." in name]
    assert not any(torch.equal(first[name], other[name]) for name in matrices)
    for name in matrices:
        bound = first[name].shape[1] ** -0.5
        assert 0.9 * bound < float(first[name].detach().abs().max()) <= bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_have_the_models_dtype(load: Loader, dtype: torch.dtype) -> None:
    loaded = load("builtin:roberta-tiny", dtype=dtype)
    model = add_lora(loaded.model, LoraConfig(), loaded.objective, SEED)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_rank_scale_and_dropout_arrive(load: Loader) -> None:
    model = adapted(load, "builtin:llama-tiny", r=5, alpha=20.0, dropout=0.25)
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    assert layer.lora_A["default"].weight.shape == (5, 64)
    assert layer.scaling["default"] == 4.0
    assert layer.lora_dropout["default"].p == 0.25
