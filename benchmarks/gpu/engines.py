"""Whole optimiser steps of a 7B-shaped model under DeepSpeed on one rank: dense, MIGU and KIF."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from cl_dist.benchmarks.engine_steps import EngineStep, race_methods
from cl_dist.benchmarks.gpu.measuring import Record
from cl_dist.benchmarks.gpu.profile import profiled, waits
from cl_dist.benchmarks.shapes import MODELS
from cl_dist.benchmarks.training import StepSize

THRESHOLD = 0.7
METHODS = ("dense", "migu", "kif")
SHARE = 0.8
BYTES_PER_WEIGHT = 2 + 4 + 12 + 2
"""Weights, gradients, AdamW's masters and moments, and what reductions and copies take; KIF adds `KIF_BYTES`."""
KIF_BYTES = 12
MOST_LAYERS = 6
"""Enough to see the shape of a step; building more takes longer than measuring them."""


def measure(record: Record, device: torch.device) -> None:
    """Stages 2 and 3 with all weights, and stage 2 with adapters."""
    import deepspeed  # noqa: F401 - a missing package skips the part instead of every measurement by itself

    for stage, lora in ((2, None), (3, None), (2, record.size(8, 4))):
        kind = "full" if lora is None else f"LoRA r {lora}"
        size = _size(record, device, lora)
        name = f"ZeRO-{stage}, {kind}, {size.layers} layers, {size.tokens} tokens"
        record.measure(name, partial(_race, record, size, stage))
        for method in ("migu", "kif"):
            record.measure(f"{name}, profile of {method}", partial(_profile, device, size, stage, method))


def _size(record: Record, device: torch.device, lora: int | None) -> StepSize:
    if record.tiny:
        return StepSize(32, 64, 4, 4, 1, 16, THRESHOLD, "float32", lora)
    model = MODELS["llama2-7b"]
    per_layer = sum(layer.outputs * layer.inputs for layer in model.block_layers())
    needed = per_layer * (len(METHODS) * BYTES_PER_WEIGHT + KIF_BYTES)  # each method has a model of its own
    layers = max(1, min(MOST_LAYERS, int(SHARE * torch.cuda.mem_get_info(device)[0] / needed)))
    widths = (model.hidden, model.intermediate, model.heads, model.heads)
    return StepSize(*widths, layers, 4096, THRESHOLD, "bfloat16", lora)


def _race(record: Record, size: StepSize, stage: int) -> dict[str, Any]:
    times = race_methods(size, stage, record.size(7, 2), METHODS)
    return {
        "stage": stage,
        "layers": size.layers,
        "tokens": size.tokens,
        "lora": size.lora,
        "seconds": {name: times.spread(name).as_dict() for name in METHODS},
        **{f"{name}_over_dense": times.ratio(name, "dense").as_dict() for name in METHODS if name != "dense"},
    }


def _profile(device: torch.device, size: StepSize, stage: int, method: str) -> dict[str, Any]:
    engine = EngineStep(size, stage, method)
    try:
        return {**profiled(engine.step, device), **waits(engine.step, device)}
    finally:
        engine.close()
