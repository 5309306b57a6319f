#!/usr/bin/env python3
"""Weight gradient of a linear layer, kept rows only: `cl-dist bench weight-grad`, or this file as a script."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator

import torch

from cl_dist.benchmarks import limits
from cl_dist.benchmarks.command import main
from cl_dist.benchmarks.harness import Contestant, clock_for, race
from cl_dist.benchmarks.report import Column, Entry, timed
from cl_dist.benchmarks.shapes import Layer, layers_of
from cl_dist.kernels import kept_rows, masked_weight_grad, reference

PAIRS = (("masked", "dense"), ("masked", "reference"), ("masked", "torch"))
COLUMNS = (
    Column("rows", "hidden"),
    Column("inputs", "inputs"),
    Column("tokens", "tokens"),
    Column("dense, ms", "seconds.dense", "milliseconds"),
    Column("masked, ms", "seconds.masked", "milliseconds"),
    Column("masked / dense", "masked_over_dense", "ratio"),
    Column("masked / reference", "masked_over_reference", "ratio"),
    Column("masked / torch's operations", "masked_over_torch", "ratio"),
    Column("dense, of the peak", "of_limit.dense", "percent"),
    Column("masked, of the peak", "of_limit.masked", "percent"),
)


def entries(options: Namespace, device: torch.device) -> Iterator[Entry]:
    """Measure each layer with each number of tokens."""
    for layer in layers_of(options.hidden, options.shapes):
        for tokens in options.tokens:
            yield _entry(layer, tokens, options, device)


def _entry(layer: Layer, tokens: int, options: Namespace, device: torch.device) -> Entry:
    dtype = getattr(torch, options.dtype)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, layer.inputs, generator=generator).to(device, dtype)
    dy = torch.randn(tokens, layer.outputs, generator=generator).to(device, dtype)
    kept = kept_rows(layer.outputs, options.threshold)
    rows = torch.randperm(layer.outputs, generator=generator)[:kept].sort().values.to(device)
    best, best_operations = limits.product(dtype, device)
    contestants = {
        "masked": Contestant(lambda: masked_weight_grad(x, dy, rows)),
        "dense": Contestant(lambda: dy.t() @ x),
        "reference": Contestant(lambda: reference.masked_weight_grad(x, dy, rows)),
        "torch": Contestant(lambda: gathered(x, dy, rows)),
        limits.PRODUCT: best,
    }
    times = race(contestants, options.runs, clock_for(device))
    work = {"dense": 2 * tokens * layer.outputs * layer.inputs, "masked": 2 * tokens * kept * layer.inputs}
    return {
        "hidden": layer.outputs,
        "inputs": layer.inputs,
        "tokens": tokens,
        "threshold": options.threshold,
        "kept_rows": kept,
        "dtype": options.dtype,
        **timed(times, PAIRS),
        "operations": work,
        "teraflops": {name: work[name] / times.spread(name).median / 1e12 for name in work},
        "of_limit": {
            name: limits.of_limit(times, name, limits.PRODUCT, work[name], best_operations).as_dict() for name in work
        },
    }


def gathered(x_TI: torch.Tensor, dy_TO: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """With torch operations: gather the columns, multiply, scatter the product into zeros."""
    product = dy_TO.index_select(1, rows).t() @ x_TI
    return torch.zeros(dy_TO.shape[1], x_TI.shape[1], dtype=x_TI.dtype, device=x_TI.device).index_copy_(
        0, rows, product
    )


if __name__ == "__main__":
    main("weight-grad")
