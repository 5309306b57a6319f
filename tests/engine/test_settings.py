"""DeepSpeed's configuration, with raw settings merged in, learning rates, and weight decay groups."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cl_dist.config.schema import ModelConfig, Recipe, StreamConfig, TaskConfig, TrainConfig, ZeroConfig
from cl_dist.engine.settings import CPU_BUCKET_ELEMENTS, build_adamw, deepspeed_config, learning_rate


def config(train: dict[str, Any] | None = None, **zero: Any) -> dict[str, Any]:
    return deepspeed_config(
        Recipe(
            model=ModelConfig(name_or_path="builtin:llama-tiny"),
            stream=StreamConfig(tasks=(TaskConfig(name="t", format="builtin"),)),
            train=TrainConfig(**(train or {})),
            zero=ZeroConfig(**zero),
            output_dir="unused",
        )
    )


def test_the_recipe_decides() -> None:
    found = config({"micro_batch_size": 3, "gradient_accumulation": 5, "clip": 0.5, "dtype": "bfloat16"}, stage=2)
    assert found["train_micro_batch_size_per_gpu"] == 3
    assert found["gradient_accumulation_steps"] == 5
    assert found["gradient_clipping"] == 0.5
    assert found["bf16"] == {"enabled": True}
    assert found["zero_optimization"]["stage"] == 2
    assert "offload_optimizer" not in found["zero_optimization"]


def test_the_precision_of_sums_of_gradients() -> None:
    keys = ("data_types", "communication_data_type")
    for train in (
        {},
        {"dtype": "bfloat16"},
        {"grad_dtype": "float32"},
        {"dtype": "bfloat16", "grad_dtype": "bfloat16"},
    ):
        assert not any(key in config(train, stage=1) for key in keys), "DeepSpeed's own default is wanted"
    found = config({"dtype": "bfloat16", "grad_dtype": "float32"}, stage=1)
    assert [found[key] for key in keys] == [{"grad_accum_dtype": "fp32"}, "fp32"]


def test_no_clipping_is_zero() -> None:
    assert config({"clip": None})["gradient_clipping"] == 0.0


def test_offload_is_to_the_cpu() -> None:
    assert config(stage=3, offload=True)["zero_optimization"]["offload_optimizer"]["device"] == "cpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="GPUs keep DeepSpeed's own buckets")
def test_raw_settings_replace_one_value_and_keep_its_neighbours() -> None:
    section = config(stage=2, deepspeed={"zero_optimization": {"reduce_bucket_size": 7}})["zero_optimization"]
    assert section["reduce_bucket_size"] == 7
    assert section["allgather_bucket_size"] == CPU_BUCKET_ELEMENTS
    assert section["stage"] == 2


def rates(total: int = 10, **settings: object) -> list[float]:
    train = TrainConfig(learning_rate=1.0, **settings)  # type: ignore[arg-type]
    return [learning_rate(train, step, total) for step in range(total)]


def test_a_constant_learning_rate() -> None:
    assert rates() == [1.0] * 10


def test_the_warm_up_rises_to_the_peak() -> None:
    assert rates(warmup_steps=4)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_a_linear_schedule_falls_towards_zero_after_the_warm_up() -> None:
    assert rates(schedule="linear", warmup_steps=2) == pytest.approx(
        [0.5, 1, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]
    )


def test_a_cosine_schedule_is_half_way_in_the_middle() -> None:
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
