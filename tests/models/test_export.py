"""Exports load with transformers and peft, and do not mention the machine they come from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn

from cl_dist.config.objectives import objectives_of
from cl_dist.config.schema import BUILTIN_FAMILIES, BUILTIN_MODELS, LoraConfig
from cl_dist.models.export import export_model
from cl_dist.models.load import AUTO_CLASSES
from cl_dist.models.lora import add_lora
from tests.models.conftest import SEED, Loader

CASES = [(name, objective) for name in BUILTIN_MODELS for objective in objectives_of(BUILTIN_FAMILIES[name])]


def noisy_weights(model: nn.Module) -> dict[str, Tensor]:
    """Weights as training could leave them; the model keeps its own."""
    generator = torch.Generator().manual_seed(8)
    return {
        name: (parameter + 0.1 * torch.randn(parameter.shape, generator=generator)).detach()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def outputs(model: nn.Module, objective: str) -> Tensor:
    ids = torch.arange(5, 30)[None]
    extra = {"decoder_input_ids": ids[:, :3]} if objective == "seq2seq_lm" else {}
    logits: Tensor = model.eval()(input_ids=ids, **extra).logits
    return logits


@pytest.mark.parametrize(("name", "objective"), CASES)
def test_a_model_comes_back(load: Loader, tmp_path: Path, name: str, objective: str) -> None:
    loaded = load(name, objective)
    weights = noisy_weights(loaded.model)
    export_model(loaded.model, loaded.tokenizer, tmp_path, weights)
    back, report = AUTO_CLASSES[loaded.objective].from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert all(torch.equal(parameter, weights[key]) for key, parameter in back.named_parameters())
    loaded.model.load_state_dict(weights, strict=False)
    assert torch.equal(outputs(back, objective), outputs(loaded.model, objective))


@pytest.mark.parametrize(("name", "objective"), CASES)
def test_an_adapter_comes_back(load: Loader, tmp_path: Path, name: str, objective: str) -> None:
    loaded = load(name, objective)
    model = add_lora(loaded.model, LoraConfig(r=3), loaded.objective, SEED)
    weights = noisy_weights(model)
    export_model(model, loaded.tokenizer, tmp_path, weights)
    back = PeftModel.from_pretrained(load(name, objective).model, tmp_path)
    model.load_state_dict(weights, strict=False)
    before = outputs(load(name, objective).model, objective)
    assert torch.equal(outputs(back, objective), outputs(model, objective))
    assert not torch.equal(outputs(back, objective), before)
    assert sum(t.numel() for t in load_file(tmp_path / "adapter_model.safetensors").values()) == sum(
        t.numel() for t in weights.values()
    ), "only the adapter is written"


def test_no_paths_are_written(load: Loader, folders: dict[str, Path], tmp_path: Path) -> None:
    """The adapter names its base as the recipe did; a whole model names nothing."""
    loaded = load(folders["llama"])
    export_model(loaded.model, loaded.tokenizer, tmp_path / "full", dict(loaded.model.named_parameters()))
    for file in (tmp_path / "full").glob("*.json"):
        assert str(folders["llama"].parent) not in file.read_text(encoding="utf-8"), file.name
    model = add_lora(loaded.model, LoraConfig(), loaded.objective, SEED)
    export_model(model, loaded.tokenizer, tmp_path / "adapter", noisy_weights(model))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == str(folders["llama"])
    assert not (tmp_path / "adapter" / "README.md").exists()


def test_a_missing_tensor_is_an_error(load: Loader, tmp_path: Path) -> None:
    loaded = load("builtin:llama-tiny")
    weights = noisy_weights(loaded.model)
    del weights["model.norm.weight"]
    with pytest.raises(
        ValueError, match=r"1 tensors are missing from the weights to write, the first is model\.norm\.weight"
    ):
        export_model(loaded.model, loaded.tokenizer, tmp_path, weights)
    assert not list(tmp_path.iterdir())


def test_a_shard_is_no_tensor(load: Loader, tmp_path: Path) -> None:
    loaded = load("builtin:llama-tiny")
    weights = noisy_weights(loaded.model)
    weights["lm_head.weight"] = weights["lm_head.weight"].flatten()[:100]
    with pytest.raises(ValueError, match=r"lm_head\.weight has shape \(100,\), but \(261, 64\) in the model"):
        export_model(loaded.model, loaded.tokenizer, tmp_path, weights)
