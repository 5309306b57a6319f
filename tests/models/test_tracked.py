"""Which layers MIGU tracks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import pytest

from cl_dist.config.schema import LoraConfig
from cl_dist.errors import BadInput
from cl_dist.models.lora import add_lora
from cl_dist.models.tracked import tracked_layers
from tests.models.conftest import SEED, Loader

LLAMA = {
    *(f"self_attn.{part}_proj" for part in "qkvo"),
    *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
}
ROBERTA = {
    *(f"attention.self.{part}" for part in ("query", "key", "value")),
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
}
T5_ENCODER = {
    *(f"layer.0.SelfAttention.{part}" for part in "qkvo"),
    "layer.1.DenseReluDense.wi",
    "layer.1.DenseReluDense.wo",
}
T5_DECODER = {
    *(f"layer.0.SelfAttention.{part}" for part in "qkvo"),
    *(f"layer.1.EncDecAttention.{part}" for part in "qkvo"),
    "layer.2.DenseReluDense.wi",
    "layer.2.DenseReluDense.wo",
}
BLOCKS = {
    "builtin:llama-tiny": {f"model.layers.{i}.{part}" for i in range(2) for part in LLAMA},
    "builtin:roberta-tiny": {f"roberta.encoder.layer.{i}.{part}" for i in range(2) for part in ROBERTA},
    "builtin:t5-tiny": {f"encoder.block.{i}.{part}" for i in range(2) for part in T5_ENCODER}
    | {f"decoder.block.{i}.{part}" for i in range(2) for part in T5_DECODER},
}
HEADS = {
    ("builtin:llama-tiny", "causal_lm"): {"lm_head"},
    ("builtin:llama-tiny", "classification"): {"score"},
    ("builtin:roberta-tiny", "classification"): {"classifier.dense", "classifier.out_proj"},
}


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_are_every_linear_layer_inside_them(load: Loader, name: str) -> None:
    model = load(name).model
    tracked = tracked_layers(model, "blocks")
    assert set(tracked) == BLOCKS[name]
    assert list(tracked) == [name for name, _ in model.named_modules() if name in tracked], "model order"
    parameters = dict(model.named_parameters())
    assert all(parameters[layer.weight] is layer.module.weight for layer in tracked.values())


@pytest.mark.parametrize(("name", "objective"), HEADS)
def test_all_adds_the_head(load: Loader, name: str, objective: str) -> None:
    model = load(name, objective).model
    assert set(tracked_layers(model, "all")) == BLOCKS[name] | HEADS[name, objective]


@pytest.mark.parametrize(("name", "objective"), [("builtin:t5-tiny", "auto"), ("builtin:roberta-tiny", "masked_lm")])
def test_a_tied_head_is_refused(load: Loader, name: str, objective: str) -> None:
    model = load(name, objective).model
    assert tracked_layers(model, "blocks")
    with pytest.raises(BadInput, match=r"method\.layers: lm_head\S* shares its weight with .*; allowed for this model"):
        tracked_layers(model, "all")


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("layers", ["blocks", "all"])
def test_lora_matrices_are_tracked_each_by_itself(load: Loader, name: str, layers: Literal["blocks", "all"]) -> None:
    """The frozen layers are not tracked, nor is the frozen copy of a classifier's head that peft keeps."""
    loaded = load(name)
    model = add_lora(loaded.model, LoraConfig(r=2), loaded.objective, SEED)
    expected = {f"base_model.model.{layer}.lora_{matrix}.default" for layer in BLOCKS[name] for matrix in "AB"}
    if layers == "all" and loaded.objective == "classification":
        saved = "base_model.model.classifier.modules_to_save.default"
        expected |= {f"{saved}.dense", f"{saved}.out_proj"}
    tracked = tracked_layers(model, layers)
    assert set(tracked) == expected
    assert all(f"{name}.weight" in dict(model.named_parameters()) for name in tracked)


def test_an_adapter_on_the_head_counts_as_the_head(load: Loader) -> None:
    loaded = load("builtin:llama-tiny")
    model = add_lora(loaded.model, LoraConfig(target_modules=("lm_head", "q_proj")), "causal_lm", SEED)
    head = {f"base_model.model.lm_head.lora_{matrix}.default" for matrix in "AB"}
    assert set(tracked_layers(model, "all")) - set(tracked_layers(model, "blocks")) == head


def test_frozen_layers_are_not_tracked(load: Loader) -> None:
    model = load("builtin:llama-tiny").model
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    assert set(tracked_layers(model, "blocks")) == BLOCKS["builtin:llama-tiny"] - {"model.layers.0.mlp.up_proj"}


def test_a_model_without_linear_layers_is_refused(load: Loader) -> None:
    model = load("builtin:llama-tiny").model
    model.model.layers.requires_grad_(False)
    with pytest.raises(BadInput, match=r"LlamaForCausalLM has no trainable linear layer inside transformer blocks"):
        tracked_layers(model, "blocks")


def share_weight(model: Any) -> None:
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight


def share_layer(model: Any) -> None:
    model.model.layers[1].mlp = model.model.layers[0].mlp


@pytest.mark.parametrize("share", [share_weight, share_layer])
def test_shared_layers_are_refused(load: Loader, share: Callable[[Any], None]) -> None:
    model = load("builtin:llama-tiny").model
    share(model)
    with pytest.raises(
        BadInput,
        match=r"model\.layers\.0\.mlp\.\S+ shares its weight with model\.layers\.1\.mlp.* LoRA or ",
    ):
        tracked_layers(model, "blocks")
