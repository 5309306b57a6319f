"""Rank side of tests/sharding/test_maps.py: where DeepSpeed really puts the pieces of a model's parameters."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

from cl_dist.config.schema import LoraConfig, TrainConfig
from cl_dist.engine.distributed import join
from cl_dist.engine.settings import build_adamw, optimizer_groups
from cl_dist.models.builtin import builtin_config
from cl_dist.models.lora import add_lora
from cl_dist.sharding import ShardView

ALIGNED = {"parameter_alignment": True}
CASES: dict[str, dict[str, Any]] = {
    "odd, stage 1": {"model": "odd", "stage": 1},
    "odd, stage 2": {"model": "odd", "stage": 2},
    "odd, stage 2, aligned": {"model": "odd", "stage": 2, "zero": ALIGNED},
    "odd, stage 2, aligned, bfloat16": {"model": "odd", "stage": 2, "zero": ALIGNED, "dtype": "bfloat16"},
    "odd, stage 3": {"model": "odd", "stage": 3},
    "odd, stage 3, sub-groups": {"model": "odd", "stage": 3, "zero": {"sub_group_size": 10}},
    "odd, stage 0": {"model": "odd", "stage": 0},
    "odd, stage 0, bfloat16": {"model": "odd", "stage": 0, "dtype": "bfloat16"},
    "odd, stage 1, bfloat16, float32 sums": {"model": "odd", "stage": 1, "dtype": "bfloat16", "sums": "fp32"},
    "llama, stage 2": {"model": "llama", "stage": 2},
    "llama, stage 3": {"model": "llama", "stage": 3, "dtype": "bfloat16"},
    "lora, stage 1": {"model": "lora", "stage": 1},
    "lora, stage 3": {"model": "lora", "stage": 3},
}


class Odd(torch.nn.Module):
    """Parameters of odd sizes, some with fewer elements than a job has ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = torch.nn.Linear(5, 7)
        self.norm = torch.nn.LayerNorm(7)
        self.narrow = torch.nn.Linear(7, 1)
        self.frozen = torch.nn.Linear(3, 3).requires_grad_(False)
        self.scale = torch.nn.Parameter(torch.ones(1, 2))


def build(kind: str) -> torch.nn.Module:
    """The model of a case."""
    if kind == "odd":
        return Odd()
    model: PreTrainedModel | PeftModel = AutoModelForCausalLM.from_config(builtin_config("builtin:llama-tiny"))
    return add_lora(model, LoraConfig(r=3), "causal_lm", 0) if kind == "lora" else model


def look() -> dict[str, Any]:
    """By name of a case, what this rank holds: each piece's place by parameter name, and the flat tensors' sizes."""
    return {name: _places(**settings) for name, settings in CASES.items()}


def run() -> dict[str, Any]:
    """`look` in a job of its own."""
    join(timeout_seconds=120)
    return look()


def _places(
    model: str, stage: int, dtype: str = "float32", zero: dict[str, Any] | None = None, sums: str | None = None
) -> dict[str, Any]:
    module = build(model).to(getattr(torch, dtype))
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage, **(zero or {})},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": dtype == "bfloat16"},
        **({"data_types": {"grad_accum_dtype": sums}} if sums else {}),
    }
    groups = [{name: param.numel() for name, param in group.items()} for group in optimizer_groups(module)]
    optimizer = build_adamw(module, TrainConfig())
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config, dist_init_required=False)
    view = ShardView(engine)
    flats = [id(flat) for flat in view.layout.flat_tensors()]
    found = {name: view.layout.address(param) for name, param in view.params.items()}
    pieces = {n: [flats.index(id(at.flat)), at.offset, at.start, at.numel] for n, at in found.items() if at is not None}
    sizes = [flat.numel() for flat in view.layout.flat_tensors()]
    engine.destroy()
    return {"groups": groups, "pieces": pieces, "sizes": sizes}
