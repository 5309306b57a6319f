"""Learning rates and weight decay groups."""

import pytest
import torch

from cl_dist.config.schema import TrainConfig
from cl_dist.engine.optimizer import build_adamw, learning_rate


def rates(total: int = 10, **settings: object) -> list[float]:
    train = TrainConfig(learning_rate=1.0, **settings)  # type: ignore[arg-type]
    return [learning_rate(train, step, total) for step in range(total)]


def test_constant() -> None:
    assert rates() == [1.0] * 10


def test_warm_up_rises_to_the_peak() -> None:
    assert rates(warmup_steps=4)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_linear_falls_towards_zero_after_the_warm_up() -> None:
    assert rates(schedule="linear", warmup_steps=2) == pytest.approx(
        [0.5, 1, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]
    )


def test_cosine_is_half_way_in_the_middle() -> None:
    values = rates(schedule="cosine")
    assert values[0] == 1.0
    assert values[5] == pytest.approx(0.5)
    assert values == sorted(values, reverse=True)


def test_only_matrices_decay_and_frozen_parameters_are_left_out() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2), torch.nn.Linear(2, 2))
    model[2].weight.requires_grad_(False)
    optimizer = build_adamw(model, TrainConfig(weight_decay=0.1))
    decayed, rest = optimizer.param_groups
    assert [p.shape for p in decayed["params"]] == [(2, 3)]
    assert decayed["weight_decay"] == 0.1
    assert len(rest["params"]) == 4
    assert rest["weight_decay"] == 0.0
