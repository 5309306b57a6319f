"""Forward and backward of a 7B-shaped model on one device: dense, MIGU and KIF, all weights and adapters only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from cl_dist.benchmarks.gpu.ceilings import synchronize
from cl_dist.benchmarks.gpu.measuring import Record
from cl_dist.benchmarks.gpu.profile import profiled, waits
from cl_dist.benchmarks.harness import clock_for, race
from cl_dist.benchmarks.shapes import MODELS
from cl_dist.benchmarks.training import WAYS, Important, StepSize, Way, build_model, operations, token_ids

THRESHOLD = 0.7
PAIRS = (("masked", "dense"), ("kif", "dense"), ("masked", "reference"))
SHARE = 0.8
"""Share of the free memory that a step may plan with."""
MOST_SECONDS = 0.35
"""Estimated length of a dense step that leaves time for all of them; fewer layers are built for longer ones."""
TERAFLOPS = 400
"""A pessimistic rate for that estimate."""


def measure(record: Record, device: torch.device) -> None:
    """Whole steps: the numbers of tokens that matter most first."""
    for lora in (None, record.size(8, 4)):
        for tokens in record.size((4096, 1024), (16,)):
            kind = "full" if lora is None else f"LoRA r {lora}"
            size = step_size(record, device, tokens, lora)
            name = f"{kind}, {tokens} tokens, {size.layers} layers"
            _measure(record, device, name, size)


def step_size(record: Record, device: torch.device, tokens: int, lora: int | None) -> StepSize:
    """Llama2-7B's widths with as many layers as fit into the memory and the time; a tiny Llama on a CPU."""
    if record.tiny:
        return StepSize(32, 64, 4, 4, 1, tokens, THRESHOLD, "float32", lora)
    model = MODELS["llama2-7b"]
    per_layer = sum(layer.outputs * layer.inputs for layer in model.block_layers())
    # Weights and gradients in bfloat16, KIF's two states in float32; activations of a block without recomputation.
    trained = 2 + 8 if lora is None else 0
    activations = tokens * (34 * model.hidden + 8 * model.intermediate)
    fit = int(SHARE * torch.cuda.mem_get_info(device)[0] / ((2 + trained) * per_layer + activations))
    affordable = int(MOST_SECONDS * TERAFLOPS * 1e12 / (6 * per_layer * tokens))
    layers = max(1, min(model.blocks, fit, affordable))
    heads = model.heads
    return StepSize(model.hidden, model.intermediate, heads, heads, layers, tokens, THRESHOLD, "bfloat16", lora)


def _measure(record: Record, device: torch.device, name: str, size: StepSize) -> None:
    """The race first; then, each by itself, what the profiler and PyTorch report on one step of each way."""
    built: dict[str, Any] = {}

    def ways() -> Mapping[str, Way]:
        # Built within a measurement, so that a lack of memory or of a package is that measurement's result.
        if not built:
            model: nn.Module = build_model(size, device)
            ids = token_ids(size).to(device)
            built.update({way: kind(model, ids, size.threshold) for way, kind in {**WAYS, "kif": Important}.items()})
        return built

    record.measure(name, lambda: _race(record, device, size, ways()))
    for way in ("masked", "dense", "kif"):
        record.measure(f"{name}, profile of {way}", partial(_with, ways, way, partial(profiled, device=device)))
    record.measure(f"{name}, waits of masked", partial(_with, ways, "masked", partial(waits, device=device)))
    built.clear()


def _race(record: Record, device: torch.device, size: StepSize, ways: Mapping[str, Way]) -> dict[str, Any]:
    contestants = {name: way.contestant() for name, way in ways.items()}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    times = race(contestants, record.size(9, 2), clock_for(device))
    work = operations(ways["dense"].model, size)
    return {
        "layers": size.layers,
        "tokens": size.tokens,
        "lora": size.lora,
        "seconds": {name: times.spread(name).as_dict() for name in ways},
        **{f"{above}_over_{below}": times.ratio(above, below).as_dict() for above, below in PAIRS},
        "arithmetic_limit": work["masked"] / work["dense"],
        "dense_teraflops": work["dense"] / times.spread("dense").median / 1e12,
        "peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    }


def _with(
    ways: Callable[[], Mapping[str, Way]], name: str, examine: Callable[[Callable[[], object]], dict[str, Any]]
) -> dict[str, Any]:
    """Examine one step of a way, which starts without gradients, as after an optimiser's step."""
    way = ways()[name]
    way.prepare()

    def step() -> None:
        way.model.zero_grad(set_to_none=True)
        way.step()

    try:
        found = examine(step)
        synchronize(way.ids.device)
        return found
    finally:
        way.remove()
