"""Translates a recipe into DeepSpeed's configuration."""

from __future__ import annotations

from typing import Any

import torch

from cl_dist.config.schema import Recipe

CPU_BUCKET_ELEMENTS = 20_000_000
"""DeepSpeed's default buckets hold 5e8 elements: two gigabytes, too much for a small machine."""


def deepspeed_config(recipe: Recipe) -> dict[str, Any]:
    """Return DeepSpeed's configuration, with the raw settings of `zero.deepspeed` merged in last.

    They cannot contradict the recipe: its validation refuses raw settings that the recipe itself determines.
    """
    train = recipe.train
    zero: dict[str, Any] = {"stage": recipe.zero.stage}
    if not torch.cuda.is_available():
        zero["reduce_bucket_size"] = CPU_BUCKET_ELEMENTS
        zero["allgather_bucket_size"] = CPU_BUCKET_ELEMENTS
        zero["overlap_comm"] = False  # which needs a GPU's streams
    if recipe.zero.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": train.gradient_accumulation,
        "gradient_clipping": train.clip or 0.0,
        "zero_optimization": zero,
        # Torch's fused AdamW everywhere, under offload too: DeepSpeed's own CPU one would have to be compiled first.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": train.dtype == "bfloat16"},
        "steps_per_print": None,
    }
    return _merged(config, recipe.zero.deepspeed)


def _merged(base: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    """Merge `extra` into a copy of `base`, section by section."""
    result = dict(base)
    for key, value in extra.items():
        inside = result.get(key)
        result[key] = _merged(inside, value) if isinstance(inside, dict) and isinstance(value, dict) else value
    return result
