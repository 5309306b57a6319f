"""Translates a recipe into what trains it: DeepSpeed's configuration, AdamW, and the learning rate of each step."""

from __future__ import annotations

import math
from typing import Any

import torch

from cl_dist.config.schema import Recipe, TrainConfig
from cl_dist.engine.device import uses_gpu

CPU_BUCKET_ELEMENTS = 20_000_000
"""DeepSpeed's default buckets hold 5e8 elements: two gigabytes, too much for a small machine."""


def deepspeed_config(recipe: Recipe, gpu: bool | None = None) -> dict[str, Any]:
    """Return DeepSpeed's configuration, with the raw settings of `zero.deepspeed` merged in last.

    They cannot contradict the recipe: its validation refuses raw settings that the recipe itself determines.

    Args:
        recipe: The run's settings.
        gpu: Whether the ranks train on GPUs; None: as on this machine.
    """
    train, gpu = recipe.train, uses_gpu() if gpu is None else gpu
    zero: dict[str, Any] = {"stage": recipe.zero.stage}
    if not gpu:
        zero["reduce_bucket_size"] = CPU_BUCKET_ELEMENTS
        zero["allgather_bucket_size"] = CPU_BUCKET_ELEMENTS
        zero["overlap_comm"] = False  # which needs a GPU's streams
    if recipe.zero.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": gpu}
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
    if train.dtype == "bfloat16" and train.grad_dtype == "float32":
        # One is about the sum over micro-batches, the other about the sum over ranks.
        config["data_types"] = {"grad_accum_dtype": "fp32"}
        config["communication_data_type"] = "fp32"
    return _merged(config, recipe.zero.deepspeed)


def _merged(base: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    """Merge `extra` into a copy of `base`, section by section."""
    result = dict(base)
    for key, value in extra.items():
        inside = result.get(key)
        result[key] = _merged(inside, value) if isinstance(inside, dict) and isinstance(value, dict) else value
    return result


def build_adamw(model: torch.nn.Module, train: TrainConfig) -> torch.optim.AdamW:
    """Build AdamW over the trainable parameters, with weight decay on matrices only.

    The learning rate starts at zero, because DeepSpeed's stage 0 in bfloat16 takes a step on zero gradients while it
    initialises, and that step would decay the weights. Every training step sets its own rate.
    """
    decayed, rest = optimizer_groups(model)
    groups: list[dict[str, Any]] = [
        {"params": list(decayed.values()), "weight_decay": train.weight_decay},
        {"params": list(rest.values()), "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=0.0,
        betas=(train.beta1, train.beta2),
        eps=train.eps,
        fused=True,
    )


def optimizer_groups(
    model: torch.nn.Module,
) -> tuple[dict[str, torch.nn.Parameter], dict[str, torch.nn.Parameter]]:
    """The trainable parameters by name, in model order: those with weight decay (matrices), and the rest."""
    decayed: dict[str, torch.nn.Parameter] = {}
    rest: dict[str, torch.nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # Under stage 3 `shape` is that of an empty placeholder, and `ds_shape` that of the whole parameter.
            is_matrix = len(getattr(parameter, "ds_shape", parameter.shape)) >= 2
            (decayed if is_matrix and not name.endswith(".bias") else rest)[name] = parameter
    return decayed, rest


def learning_rate(train: TrainConfig, step: int, total: int) -> float:
    """Return the learning rate at optimiser step `step` (0-based) of a task with `total` steps.

    Linear warm-up to `train.learning_rate`, then constant, or linear or cosine decay to zero at step `total`.
    """
    if step < train.warmup_steps:
        return train.learning_rate * (step + 1) / train.warmup_steps
    progress = (step - train.warmup_steps) / max(1, total - train.warmup_steps)
    if train.schedule == "linear":
        return train.learning_rate * (1.0 - progress)
    if train.schedule == "cosine":
        return train.learning_rate * 0.5 * (1.0 + math.cos(math.pi * progress))
    return train.learning_rate
