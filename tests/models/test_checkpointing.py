"""Activation checkpointing recomputes every block and leaves the gradients as they are."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from cl_dist.config.schema import BUILTIN_MODELS, LoraConfig
from cl_dist.errors import BadInput
from cl_dist.models.checkpointing import enable_activation_checkpointing
from cl_dist.models.lora import add_lora
from cl_dist.models.structure import block_prefixes
from tests.models.conftest import SEED, Loader


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
