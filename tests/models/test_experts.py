"""The observing forward of experts computes what transformers computes, and of the gradients the chosen rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssConfig, GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHConfig, NemotronHExperts

from cl_dist.errors import BadInput, ClDistError
from cl_dist.models.experts import ExpertsTap, Routed
from cl_dist.models.layer_kinds import is_experts

EXPERTS, TOKENS, K, HIDDEN = 5, 11, 2, 8
MODULES: dict[str, Callable[[], Any]] = {
    "mixtral": lambda: MixtralExperts(
        MixtralConfig(hidden_size=HIDDEN, intermediate_size=12, num_local_experts=EXPERTS)
    ),
    "gptoss": lambda: GptOssExperts(GptOssConfig(hidden_size=HIDDEN, intermediate_size=12, num_local_experts=EXPERTS)),
    "no gate": lambda: NemotronHExperts(
        NemotronHConfig(
            hidden_size=HIDDEN, moe_intermediate_size=12, n_routed_experts=EXPERTS, moe_latent_size=None, mlp_bias=False
        )
    ),
}


def experts(name: str) -> Any:
    """Experts that run their reference implementation."""
    module = MODULES[name]()
    module.config._experts_implementation = "eager"
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    return module


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, none of which goes to the last expert."""
    generator = torch.Generator().manual_seed(1)
    scores = torch.rand(TOKENS, EXPERTS - 1, generator=generator)
    weights, index = scores.topk(K)
    return torch.randn(TOKENS, HIDDEN, generator=generator).requires_grad_(), index, weights.requires_grad_()


def gradients(module: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    hidden, index, weights = inputs()
    module.zero_grad()
    output = module(hidden, index, weights)
    output.square().sum().backward()
    found = {name: parameter.grad.clone() for name, parameter in module.named_parameters()}
    return output.detach(), {**found, "hidden": hidden.grad, "weights": weights.grad}


@pytest.mark.parametrize("name", MODULES)
def test_equals_transformers(name: str) -> None:
    module, seen = experts(name), dict[str, Routed]()
    assert is_experts(module)
    expected_output, expected = gradients(module)
    tap = ExpertsTap("experts", module, seen.__setitem__)
    assert torch.equal(gradients(module)[0], expected_output), "inactive it is transformers' own forward"
    assert not seen
    tap.active = True
    output, found = gradients(module)
    torch.testing.assert_close(output, expected_output, rtol=1e-5, atol=1e-6)
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-5, atol=1e-5, msg=key)
    assert set(seen) == {"down_proj", "up_proj" if name == "no gate" else "gate_up_proj"}
    assert all(sum(routed.per_expert) == TOKENS * K and routed.per_expert[-1] == 0 for routed in seen.values())
    tap.remove()
    assert "forward" not in module.__dict__


@pytest.mark.parametrize("name", ["mixtral", "gptoss"])
@pytest.mark.parametrize("mask_bias", [True, False])
def test_chosen_rows_of_each_expert_alone(name: str, mask_bias: bool) -> None:
    module = experts(name)
    _, whole = gradients(module)
    tap = ExpertsTap("experts", module, lambda *_: None, mask_bias)
    tap.active = tap.skips = True
    rows = {"gate_up_proj": 24, "down_proj": HIDDEN}
    tap.rows = {key: [torch.arange(expert, size, 3) for expert in range(EXPERTS)] for key, size in rows.items()}
    _, found = gradients(module)
    for key, size in rows.items():
        keep = torch.zeros(EXPERTS, size, dtype=torch.bool)
        for expert, chosen in enumerate(tap.rows[key]):
            keep[expert, chosen] = True
        mask = keep.unsqueeze(1) if module.is_transposed else keep.unsqueeze(2)
        torch.testing.assert_close(found[key], whole[key] * mask, rtol=1e-5, atol=1e-5)
        assert bool((found[key] != 0).any())
        if module.has_bias:
            bias = whole[f"{key}_bias"]
            torch.testing.assert_close(
                found[f"{key}_bias"], bias * keep if mask_bias else bias, rtol=1e-5, atol=1e-5
            )  # fmt: skip
    torch.testing.assert_close(found["hidden"], whole["hidden"], rtol=1e-5, atol=1e-5)


def test_backward_without_rows_and_a_foreign_forward_are_refused() -> None:
    module = experts("mixtral")
    tap = ExpertsTap("layers.0.experts", module, lambda *_: None)
    tap.active = tap.skips = True
    with pytest.raises(ClDistError, match=r"layer layers\.0\.experts: backward ran before the rows"):
        gradients(module)
    with pytest.raises(BadInput, match=r"library has replaced the forward of layers\.0\.experts \(MixtralExperts\)"):
        ExpertsTap("layers.0.experts", module, lambda *_: None)
