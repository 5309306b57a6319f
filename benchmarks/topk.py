#!/usr/bin/env python3
"""Selection of the kept rows of all layers of a model: `cl-dist bench topk`, or this file as a script."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Iterator, Sequence

import torch

from cl_dist.benchmarks import limits
from cl_dist.benchmarks.command import main
from cl_dist.benchmarks.harness import Contestant, clock_for, race
from cl_dist.benchmarks.report import Column, Entry, timed
from cl_dist.benchmarks.shapes import MODELS
from cl_dist.kernels import topk_row_masks

PAIRS = (("fused", "reference"), ("fused", "torch"))
COLUMNS = (
    Column("hidden", "hidden"),
    Column("layers", "layers"),
    Column("rows in all", "elements"),
    Column("fused, ms", "seconds.fused", "milliseconds"),
    Column("reference, ms", "seconds.reference", "milliseconds"),
    Column("torch's operations, ms", "seconds.torch", "milliseconds"),
    Column("fused / reference", "fused_over_reference", "ratio"),
    Column("fused / torch's operations", "fused_over_torch", "ratio"),
    Column("of the memory's rate", "of_limit.fused", "percent"),
)


def entries(options: Namespace, device: torch.device) -> Iterator[Entry]:
    """Measure the layers of a published model, or equal layers."""
    if options.shapes is not None:
        model = MODELS[options.shapes]
        yield _entry(model.hidden, [layer.outputs for layer in model.all_layers()], options, device)
        return
    for rows in options.hidden:
        yield _entry(rows, [rows] * options.layers, options, device)


def _entry(hidden: int, sizes: Sequence[int], options: Namespace, device: torch.device) -> Entry:
    flat = torch.rand(sum(sizes), generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(device)
    moved = flat.numel() * flat.element_size()
    best, best_moved = limits.reading(moved, device)
    contestants = {
        "fused": Contestant(lambda: topk_row_masks(flat, sizes, options.threshold)),
        "reference": Contestant(lambda: quantiles(flat, sizes, options.threshold)),
        "torch": Contestant(lambda: selections(flat, sizes, options.threshold)),
        limits.READ: best,
    }
    times = race(contestants, options.runs, clock_for(device))
    return {
        "hidden": hidden,
        "layers": len(sizes),
        "elements": flat.numel(),
        "threshold": options.threshold,
        **timed(times, PAIRS),
        **limits.memory_rates(times, ["fused"], limits.READ, moved, best_moved),
    }


def quantiles(flat: torch.Tensor, sizes: Sequence[int], threshold: float) -> list[torch.Tensor]:
    """Like the method's public code, one quantile and one comparison per layer; plus the row index."""
    return [(rows >= torch.quantile(rows, threshold)).nonzero() for rows in flat.split(list(sizes))]


def selections(flat: torch.Tensor, sizes: Sequence[int], threshold: float) -> list[torch.Tensor]:
    """Torch's own selection for each layer, with mask and row index."""
    return [_selected(rows, math.ceil(threshold * (rows.numel() - 1)) + 1) for rows in flat.split(list(sizes))]


def _selected(rows: torch.Tensor, rank: int) -> torch.Tensor:
    return (rows >= rows.kthvalue(rank).values).nonzero()


if __name__ == "__main__":
    main("topk")
