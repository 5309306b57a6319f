from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cl_dist.config.load import load_recipe
from cl_dist.config.schema import LoraConfig
from cl_dist.engine.settings import optimizer_groups
from cl_dist.errors import BadInput
from cl_dist.methods.s2ft.config import S2ftConfig
from cl_dist.methods.sequential.config import SequentialConfig
from cl_dist.models.load import load_model
from cl_dist.models.lora import add_lora
from cl_dist.models.structure import base_model
from cl_dist.planning.shape import describe_model
from tests.models.tiny_gguf import write_gguf
from tests.planning.models import LLAMA2_7B, llama, planned


@pytest.mark.parametrize("name", ["builtin:llama-tiny", "builtin:t5-tiny", "builtin:roberta-tiny"])
@pytest.mark.parametrize("lora", [None, LoraConfig(r=3)])
def test_the_shape_is_that_of_the_loaded_model(name: str, lora: LoraConfig | None, tmp_path: Path) -> None:
    recipe, _ = load_recipe("quickstart")
    recipe = replace(recipe, model=replace(recipe.model, name_or_path=name, lora=lora))
    loaded = load_model(recipe.model, 3, zero3_config=None, dtype=torch.float32, seed=1, cache_dir=tmp_path)
    model = loaded.model
    if lora is not None:
        model = add_lora(base_model(model), lora, loaded.objective, 1, loaded.drawn)
    shape = describe_model(recipe, labels=3)
    assert shape.objective == loaded.objective
    assert [(each.name, each.shape, each.trainable) for each in shape.parameters] == [
        (name, tuple(parameter.shape), parameter.requires_grad) for name, parameter in model.named_parameters()
    ]
    groups = [list(group) for group in optimizer_groups(model) if group]
    assert [[each.name for each in group] for group in shape.groups] == groups
    assert shape.buffer_bytes == sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    assert all(parameter.is_meta for parameter in shape.model.parameters())


def test_the_trained_part_of_a_weight_is_not_a_second_one() -> None:
    recipe, _ = load_recipe("quickstart")
    whole, halved = (
        describe_model(replace(recipe, method=(method,)))
        for method in (SequentialConfig(name="sequential"), S2ftConfig(name="s2ft", channels=0.5, heads=0.5))
    )
    assert halved.own_numel == whole.numel
    assert halved.numel > whole.numel


def test_a_gguf_file_is_planned_from_its_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, _ = load_recipe("quickstart")
    loaded = load_model(recipe.model, 0, zero3_config=None, dtype=torch.float32, seed=1, cache_dir=tmp_path)
    write_gguf(loaded.model, loaded.tokenizer, tmp_path / "tiny.gguf")  # type: ignore[arg-type]
    monkeypatch.setenv("CL_DIST_CACHE", str(tmp_path / "cache"))
    model = replace(recipe.model, name_or_path=str(tmp_path), gguf_file="tiny.gguf")
    shape = describe_model(replace(recipe, model=model))
    assert {each.name: each.shape for each in shape.parameters} == {
        name: tuple(parameter.shape) for name, parameter in loaded.model.named_parameters()
    }
    assert not (tmp_path / "cache").exists(), "the file was converted"
    with pytest.raises(
        BadInput, match=r"^model\.gguf_file: there is no other\.gguf in .*; its \.gguf files: tiny\.gguf"
    ):
        describe_model(replace(recipe, model=replace(model, gguf_file="other.gguf")))


def test_seven_billion_parameters_from_a_configuration_alone() -> None:
    _, shape = planned(config=llama(vocab_size=32000, **LLAMA2_7B), dtype="bfloat16")
    assert shape.numel == 6_738_415_616
    assert shape.nbytes == 2 * shape.numel
    assert shape.vocabulary == 32000


def test_weights_in_bfloat16_take_half() -> None:
    _, shape = planned(dtype="bfloat16")
    assert {each.itemsize for each in shape.parameters} == {2}


def test_a_model_without_configuration_is_refused(tmp_path: Path) -> None:
    recipe, _ = load_recipe("quickstart")
    recipe = replace(recipe, model=replace(recipe.model, name_or_path=str(tmp_path / "nowhere")))
    with pytest.raises(BadInput, match=r"^model\.name_or_path"):
        describe_model(recipe)
