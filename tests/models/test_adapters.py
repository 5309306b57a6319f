"""A growing number of adapters: which are trained, their initial values, and their export as one adapter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from cl_dist.config.schema import LoraConfig
from cl_dist.models.export import export_model
from cl_dist.models.lora import add_lora, frozen_adapters, grow_adapters, in_adapter, load_adapter
from tests.models.conftest import SEED, Loader
from tests.models.test_export import outputs

FAMILIES = [("llama", "causal_lm"), ("t5", "seq2seq_lm"), ("roberta", "classification")]
LORA = LoraConfig(r=3, alpha=7.0)


def grown(load: Loader, family: str, count: int) -> PeftModel:
    loaded = load(f"builtin:{family}-tiny")
    model = add_lora(loaded.model, LORA, loaded.objective, SEED)
    grow_adapters(model, count, SEED)
    return model


def trained(model: PeftModel) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("family", ["llama", "t5", "roberta"])
def test_the_newest_adapter_and_the_head_are_trained(load: Loader, family: str) -> None:
    model = grown(load, family, 1)
    matrices = {name for name in trained(model) if ".lora_" in name}
    head = trained(model) - matrices
    assert bool(head) == (family == "roberta")
    assert grow_adapters(model, 3, SEED)
    assert trained(model) == {name.replace(".default.", ".task2.") for name in matrices} | head
    earlier = {name.replace(".default.", f".{adapter}.") for name in matrices for adapter in ("default", "task1")}
    assert set(frozen_adapters(model)) == earlier
    assert not grow_adapters(model, 3, SEED), "there was nothing to do"


def test_each_adapter_has_its_own_initial_values_however_it_was_added(load: Loader) -> None:
    """One by one, two at once, or again after removal."""
    at_once, again = grown(load, "llama", 3), grown(load, "llama", 4)
    step_by_step = grown(load, "llama", 2)
    assert grow_adapters(step_by_step, 3, SEED)
    assert grow_adapters(again, 1, SEED)
    assert trained(again) == trained(grown(load, "llama", 1))
    assert grow_adapters(again, 3, SEED)
    values = dict(at_once.named_parameters())
    for other in (step_by_step, again):
        assert trained(other) == trained(at_once)
        assert {name for name, _ in other.named_parameters()} == set(values)
        assert all(torch.equal(parameter, values[name]) for name, parameter in other.named_parameters())
    matrices = [name for name in values if ".lora_A.default." in name]
    assert not any(torch.equal(values[name], values[name.replace("default", "task1")]) for name in matrices)
    assert not any(values[name].any() for name in values if ".lora_B." in name)


@pytest.mark.parametrize(("family", "objective"), FAMILIES)
def test_they_export_as_one_adapter_with_the_same_outputs(
    load: Loader, tmp_path: Path, family: str, objective: str
) -> None:
    model = grown(load, family, 3)
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if in_adapter(name, parameter):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    weights = {name: parameter.detach() for name, parameter in model.named_parameters() if in_adapter(name, parameter)}
    export_model(model, load(f"builtin:{family}-tiny").tokenizer, tmp_path, weights)
    back = load_adapter(load(f"builtin:{family}-tiny").model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["r"], config["lora_alpha"]) == (9, 21.0)
    assert (model.peft_config["default"].r, model.peft_config["default"].lora_alpha) == (3, 7.0)
    assert sorted(path.name for path in tmp_path.glob("**/*.safetensors")) == ["adapter_model.safetensors"]
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert {tensor.shape[0] for name, tensor in stored.items() if ".lora_A." in name} == {9}
    with torch.no_grad():
        ours, theirs, oldest = (outputs(each, objective) for each in (model, back, grown(load, family, 1)))
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)
    assert float((ours - oldest).abs().max()) > 1e-2, "the adapters have no effect"
