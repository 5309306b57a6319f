"""The DeepSpeed settings that a recipe means."""

from __future__ import annotations

from typing import Any

import torch

from cl_dist.config.schema import Recipe

CPU_BUCKET_ELEMENTS = 20_000_000
"""DeepSpeed's default buckets hold 5e8 elements: two gigabytes that a small machine does not have to spare."""


def deepspeed_config(recipe: Recipe) -> dict[str, Any]:
    """Return DeepSpeed's configuration; raw settings of `zero.deepspeed` are merged in last (the recipe refuses owned
    ones).
    """
    train = recipe.train
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": train.gradient_accumulation,
        "gradient_clipping": train.clip or 0.0,
        "zero_optimization": _zero_section(recipe),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": train.dtype == "bfloat16"},
        "steps_per_print": None,
    }
    return _merged(config, recipe.zero.deepspeed)


def _zero_section(recipe: Recipe) -> dict[str, Any]:
    section: dict[str, Any] = {"stage": recipe.zero.stage}
    if not torch.cuda.is_available():
        section["reduce_bucket_size"] = CPU_BUCKET_ELEMENTS
        section["allgather_bucket_size"] = CPU_BUCKET_ELEMENTS
        section["overlap_comm"] = False
    if recipe.zero.offload:
        section["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return section


def _merged(base: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in extra.items():
        inside = result.get(key)
        result[key] = _merged(inside, value) if isinstance(inside, dict) and isinstance(value, dict) else value
    return result
