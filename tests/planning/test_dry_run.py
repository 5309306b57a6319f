"""A dry run goes through a job of any size in this process, and finds what would not work."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cl_dist.config.load import load_recipe
from cl_dist.errors import BadInput
from cl_dist.models.published import LLAMA2_7B, LLAMA3_8B, SHAPES, known_config
from cl_dist.planning.dry_run import dry_run
from cl_dist.planning.setup import Setup
from cl_dist.planning.shape import describe_model
from tests.planning.conftest import LORA, Planned

MIGU, KIF = "method.name=migu", "method.name=kif"


@pytest.mark.parametrize("ranks", [1, 2, 7, 100])
@pytest.mark.parametrize("changes", [(MIGU, "zero.stage=3"), (KIF, "zero.stage=2"), (KIF, LORA, "zero.stage=3")])
def test_what_works_is_said_to_work(planned: Planned, changes: tuple[str, ...], ranks: int) -> None:
    found = dry_run(*planned(*changes, ranks=ranks))
    assert found.works, found.problems
    assert any("the ranks' pieces hold every element once" in note for note in found.notes)
    assert any(note.startswith(("migu: 14 tracked layers", "kif: ")) for note in found.notes)
    assert not torch.distributed.is_initialized()


def test_the_layers_are_tried_out_without_numbers(planned: Planned) -> None:
    """A layer that runs twice on other tokens would be found here, since the real hooks see the real shapes."""
    found = dry_run(*planned(MIGU))
    assert not any("not checked here: which outputs" in note for note in found.notes)


def test_a_model_without_trackable_layers_is_a_problem(planned: Planned) -> None:
    with pytest.raises(BadInput, match="shares its weight with"):
        planned("model.name_or_path=builtin:t5-tiny", MIGU, "method.layers=all")


def test_shared_weights_are_noted(planned: Planned) -> None:
    found = dry_run(*planned("model.name_or_path=builtin:t5-tiny", MIGU))
    assert any("shared weights are trained, sharded and saved once" in note for note in found.notes)


def test_small_parameters_and_idle_ranks_are_noted(planned: Planned) -> None:
    setup, shape = planned("zero.stage=3", ranks=100)
    assert any("5 parameters have fewer elements than there are ranks" in note for note in dry_run(setup, shape).notes)
    setup, shape = planned("zero.stage=2", LORA, "model.lora.target_modules=[q_proj]", nodes=40, ranks=16)
    assert any("ranks own no parameter at all" in note for note in dry_run(setup, shape).notes)


def test_parameters_larger_than_the_bucket_are_noted(planned: Planned) -> None:
    bucket = "zero.deepspeed={zero_optimization: {reduce_bucket_size: 11000}}"
    found = dry_run(*planned(bucket))
    large = "8 parameters have more elements than reduce_bucket_size (11000)"
    assert any(large in note and "model.embed_tokens.weight with 16704" in note for note in found.notes), found.notes


def test_too_few_samples_and_a_warmup_that_never_ends_are_problems(planned: Planned) -> None:
    setup, shape = planned("train.warmup_steps=20", nodes=4, ranks=8)
    assert dry_run(setup, shape, {"spring": 1000, "summer": 700}).works
    found = dry_run(setup, shape, {"spring": 300, "summer": 100})
    assert len(found.problems) == 2
    assert "1 of 2 tasks have fewer samples than a global batch of 256 (8 x 1 x 32 ranks), summer only 100" in str(
        found
    )
    assert "the longest task has 16 optimiser steps" in found.problems[1]


def test_layers_dropped_at_random_are_a_problem() -> None:
    from transformers import OPTConfig

    config = OPTConfig(
        vocab_size=64, hidden_size=32, ffn_dim=64, num_hidden_layers=1, num_attention_heads=2, layerdrop=0.1
    )
    recipe, _ = load_recipe("quickstart")
    found = dry_run(Setup(recipe, 1, 2, "cuda"), describe_model(recipe, config))
    assert "drops layers at random" in found.problems[0]


@pytest.mark.parametrize(("facts", "parameters"), [(LLAMA2_7B, 6_738_415_616), (LLAMA3_8B, 8_030_261_248)])
def test_published_shapes_have_the_published_number_of_parameters(facts: dict[str, int], parameters: int) -> None:
    width, depth, inner = (facts[name] for name in ("hidden_size", "num_hidden_layers", "intermediate_size"))
    keys = width // facts["num_attention_heads"] * facts["num_key_value_heads"]
    block = 2 * width * width + 2 * width * keys + 3 * width * inner + 2 * width
    assert 2 * facts["vocab_size"] * width + depth * block + width == parameters


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama2-7b-migu", "llama2-7b-kif", "llama3-8b-lora"])
def test_seven_billion_parameters_on_a_thousand_ranks(name: str) -> None:
    recipe, _ = load_recipe(name)
    shape = describe_model(recipe, known_config(recipe.model))
    found = dry_run(Setup(recipe, 128, 8, "cuda"), shape)
    assert found.works, found.problems
    assert any("on 1024 ranks" in note for note in found.notes)


@pytest.mark.parametrize("setting", ["ewc, fisher_batch", "agem, memory_batch"])
def test_samples_that_no_step_has_memory_for_are_a_problem(planned: Planned, setting: str) -> None:
    name, _, size = setting.partition(", ")
    most = 8 * 3
    assert dry_run(*planned(f"method={{name: {name}, {size}: {most}}}", ranks=3)).works
    found = dry_run(*planned(f"method={{name: {name}, {size}: {most + 1}}}", ranks=3))
    assert found.problems[0].startswith(f"method.{size}: {most + 1} is more than the {most} samples")


def test_inputs_longer_than_the_models_positions_are_a_problem(planned: Planned) -> None:
    found = dry_run(*planned("model.name_or_path=builtin:roberta-tiny", "train.max_length=4000"))
    assert found.problems[0].startswith("train.max_length: 4000 ")


PARAMETERS = {
    "t5-small": 60_506_624,
    "t5-large": 737_668_096,
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
    "roberta-base": 124_697_433,
}
"""As the models' cards have it, with the head of masked language modelling."""


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_models_of_shipped_recipes_have_their_shape(name: str) -> None:
    recipe, _ = load_recipe("quickstart")
    objective = "masked_lm" if name == "roberta-base" else "auto"
    recipe = replace(recipe, model=replace(recipe.model, name_or_path=name, objective=objective))
    kind, facts = SHAPES[name]
    assert describe_model(recipe, kind(**facts)).numel == PARAMETERS[name]
