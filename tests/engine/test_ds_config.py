"""DeepSpeed's configuration follows the recipe, and raw settings are merged into it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cl_dist.config.schema import ModelConfig, Recipe, StreamConfig, TaskConfig, TrainConfig, ZeroConfig
from cl_dist.engine.ds_config import CPU_BUCKET_ELEMENTS, deepspeed_config


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
