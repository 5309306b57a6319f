"""Measuring a model leaves it as it was."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import nn
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeConfig, NllbMoeTop2Router

from cl_dist.evaluation.inference import evaluating
from cl_dist.models.training_mode import evaluation_mode


@pytest.mark.parametrize("measuring", [evaluating, evaluation_mode])
def test_a_router_keeps_its_capacity(measuring: Callable[[nn.Module], AbstractContextManager[None]]) -> None:
    config = NllbMoeConfig(d_model=8, num_experts=4, expert_capacity=64, moe_eval_capacity_token_fraction=0.5)
    router = NllbMoeTop2Router(config)
    with measuring(router):
        router(torch.randn(10, 8))
        assert router.expert_capacity == 5
    assert router.expert_capacity == 64
    assert router.training
