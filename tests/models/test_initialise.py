"""Initial weights depend only on the seed and the parameter's name."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from cl_dist.config.schema import BUILTIN_MODELS
from cl_dist.models.builtin import builtin_config
from cl_dist.models.initialise import initialise_, named_seed
from tests.models.conftest import Loader


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the parameters by name."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", BUILTIN_MODELS)
def test_the_random_state_does_not_matter(load: Loader, name: str) -> None:
    torch.manual_seed(1)
    first = weights(load(name).model)
    torch.manual_seed(2)
    second = weights(load(name).model)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_another_seed_gives_other_matrices(load: Loader) -> None:
    first, second = (weights(load("builtin:llama-tiny", seed=seed).model) for seed in (1, 2))
    assert not any(torch.equal(first[key], second[key]) for key in first if first[key].ndim > 1)


def test_the_order_and_the_other_layers_do_not_matter() -> None:
    """A deeper model has the same first layers, and a part initialised alone gets the same values as in the whole."""
    shallow = AutoModelForCausalLM.from_config(builtin_config("builtin:llama-tiny"))
    config = builtin_config("builtin:llama-tiny")
    config.num_hidden_layers = 3
    deep = AutoModelForCausalLM.from_config(config)
    initialise_(shallow, 4)
    initialise_(deep, 4)
    common = weights(shallow)
    assert all(torch.equal(weights(deep)[key], value) for key, value in common.items())

    untouched = "model.layers.0.mlp.up_proj.weight"
    with torch.no_grad():
        for parameter in shallow.parameters():
            parameter.fill_(7.0)
    initialise_(shallow, 4, only=set(common) - {untouched})
    again = weights(shallow)
    assert (again.pop(untouched) == 7.0).all()
    assert all(torch.equal(common[key], value) for key, value in again.items())


def test_two_layers_of_one_shape_differ(load: Loader) -> None:
    layers = load("builtin:llama-tiny").model.model.layers
    assert not torch.equal(layers[0].mlp.up_proj.weight, layers[1].mlp.up_proj.weight)
    assert not torch.equal(layers[0].mlp.up_proj.weight, layers[0].mlp.gate_proj.weight)


def test_norms_are_one_and_biases_zero(load: Loader) -> None:
    model = load("builtin:roberta-tiny", "masked_lm").model
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    assert norms
    assert all((norm.weight == 1).all() for norm in norms)
    assert all((value == 0).all() for name, value in weights(model).items() if name.endswith("bias"))
    assert (model.roberta.embeddings.word_embeddings.weight[0] == 0).all()  # the padding token's


def test_t5_has_the_scales_of_its_paper(load: Loader) -> None:
    """Standard deviations agree with those of transformers' own initialisation within 10 %."""
    ours = load("builtin:t5-tiny").model
    torch.manual_seed(0)
    theirs = weights(AutoModelForSeq2SeqLM.from_config(builtin_config("builtin:t5-tiny")))
    for name, value in weights(ours).items():
        if value.ndim > 1 and value.numel() > 1000:
            assert float(value.std()) == pytest.approx(float(theirs[name].std()), rel=0.1), name


def test_bfloat16_is_the_rounded_float32(load: Loader) -> None:
    exact, rounded = (weights(load("builtin:t5-tiny", dtype=kind).model) for kind in (torch.float32, torch.bfloat16))
    assert all(torch.equal(value.bfloat16(), rounded[name]) for name, value in exact.items())


def test_named_seeds_are_stable() -> None:
    """The same on every machine and in every release: another value would change the results of all new runs."""
    assert named_seed(42, "lm_head.weight") == 8491267275249638506
    assert named_seed(42, "a") != named_seed(43, "a")
    assert named_seed(42, "a") != named_seed(42, "b")
