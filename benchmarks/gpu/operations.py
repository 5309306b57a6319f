"""The single operations at 7B's sizes: the ways to the masked weight gradient, and the small kernels."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from cl_dist import kernels
from cl_dist.benchmarks import importance, magnitude, optimizer, topk
from cl_dist.benchmarks.gpu.measuring import Record
from cl_dist.benchmarks.harness import Contestant, clock_for, race
from cl_dist.benchmarks.shapes import MODELS, Layer
from cl_dist.benchmarks.weight_grad import gathered

THRESHOLD = 0.7
DENSE = "dense"
Way = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], object]
"""Computes the masked weight gradient from the input, the output's gradient and the kept rows."""


def ways_to(x: torch.Tensor) -> dict[str, Way]:
    """Every way to the weight gradient by name: the dense product, the kernel's choice, and what it chooses from."""
    return {
        DENSE: lambda x, dy, rows: dy.t() @ x,
        "masked_weight_grad": kernels.masked_weight_grad,
        "gather, product, scatter": gathered,
        **kernels.weight_grad_ways(x),
    }


def weight_grads(record: Record, device: torch.device) -> None:
    """Race the ways over the shapes of Llama2-7B's layers, full ones first, then those of adapters."""
    shapes = dict.fromkeys(MODELS["llama2-7b"].block_layers())
    layers = record.size((*shapes, Layer(8, 4096), Layer(4096, 8)), (Layer(48, 32), Layer(8, 32)))
    for tokens in record.size((4096, 16384, 1024), (64,)):
        for layer in layers:
            name = f"{tokens} tokens, {layer.outputs} x {layer.inputs}"
            record.measure(name, partial(_weight_grad, record, device, layer, tokens))


def _weight_grad(record: Record, device: torch.device, layer: Layer, tokens: int) -> dict[str, Any]:
    dtype = record.size(torch.bfloat16, torch.float32)
    x, dy = (torch.randn(tokens, width, device=device).to(dtype) for width in (layer.inputs, layer.outputs))
    kept = kernels.kept_rows(layer.outputs, THRESHOLD)
    rows = torch.randperm(layer.outputs, device=device)[:kept].sort().values
    failed: dict[str, str] = {}
    contestants: dict[str, Contestant] = {}
    for name, way in ways_to(x).items():
        try:
            way(x, dy, rows)
        except (RuntimeError, ValueError) as error:  # a way that this device or shape does not have
            if "CUDA error" in str(error):
                raise
            failed[name] = str(error)[:200]
        else:
            contestants[name] = Contestant(partial(way, x, dy, rows))
    times = race(contestants, record.size(7, 2), clock_for(device))
    return {
        "tokens": tokens,
        "rows": layer.outputs,
        "inputs": layer.inputs,
        "kept_rows": kept,
        "chosen": kernels.weight_grad_way(x, kept),
        "dtype": str(dtype),
        "seconds": {name: times.spread(name).as_dict() for name in contestants},
        "over_dense": {name: times.ratio(name, DENSE).as_dict() for name in contestants},
        "dense_teraflops": 2 * tokens * layer.outputs * layer.inputs / times.spread(DENSE).median / 1e12,
        "failed_ways": failed,
    }


def others(record: Record, device: torch.device) -> None:
    """Magnitude, top-k and importance, as `cl-dist bench` measures them."""
    options = {
        "runs": record.size(5, 2),
        "threshold": THRESHOLD,
        "shapes": None,
        "dtype": record.size("bfloat16", "float32"),
    }

    def entry(module: Any, **more: Any) -> Mapping[str, Any]:
        (found,) = module.entries(Namespace(**{**options, **more}), device)
        return found

    for tokens in record.size((4096, 16384), (64,)):
        for width in record.size((4096, 11008), (48,)):
            name = f"row_magnitude, {tokens} tokens, {width} rows"
            record.measure(name, partial(entry, magnitude, hidden=(width,), tokens=(tokens,)))
    layers = record.size(224, 4)
    record.measure(
        f"topk_row_masks, {layers} layers", partial(entry, topk, hidden=(record.size(4096, 16),), layers=layers)
    )
    elements = record.size(1 << 26, 1 << 12)
    for order in ("mixed", "first"):
        chosen = {"elements": (elements,), "hidden": None, "order": order, "dtype": "float32"}
        record.measure(f"importance_update_, {elements} elements, {order}", partial(entry, importance, **chosen))
    for length in record.size((1024, 4096), (64,)):
        rows = {"elements": (elements,), "hidden": (length,), "keep": 0.3, "dtype": "float32"}
        record.measure(f"adamw_rows_, {elements} elements, rows of {length}", partial(entry, optimizer, **rows))
