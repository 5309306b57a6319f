#!/usr/bin/env python3
"""Weight gradient of a linear layer, kept columns only: `cl-dist bench column-weight-grad`, or run this file."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator

import torch

from cl_dist.benchmarks import limits
from cl_dist.benchmarks.command import main
from cl_dist.benchmarks.harness import Contestant, clock_for, race
from cl_dist.benchmarks.report import Column, Entry, timed
from cl_dist.benchmarks.shapes import Layer, layers_of
from cl_dist.kernels import column_weight_grad, kept_rows, reference

PAIRS = (("columns", "dense"), ("columns", "reference"), ("saved", "dense"))
COLUMNS = (
    Column("rows", "hidden"),
    Column("inputs", "inputs"),
    Column("tokens", "tokens"),
    Column("dense, ms", "seconds.dense", "milliseconds"),
    Column("columns, ms", "seconds.columns", "milliseconds"),
    Column("columns / dense", "columns_over_dense", "ratio"),
    Column("columns / reference", "columns_over_reference", "ratio"),
    Column("from saved columns / dense", "saved_over_dense", "ratio"),
    Column("dense, of the peak", "of_limit.dense", "percent"),
    Column("columns, of the peak", "of_limit.columns", "percent"),
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
    kept = kept_rows(layer.inputs, options.threshold)
    columns = torch.randperm(layer.inputs, generator=generator)[:kept].sort().values.to(device)
    saved = x.index_select(1, columns)
    best, best_operations = limits.product(dtype, device)
    contestants = {
        "columns": Contestant(lambda: column_weight_grad(x, dy, columns)),
        "saved": Contestant(lambda: column_weight_grad(saved, dy)),
        "dense": Contestant(lambda: dy.t() @ x),
        "reference": Contestant(lambda: reference.column_weight_grad(x, dy, columns)),
        limits.PRODUCT: best,
    }
    times = race(contestants, options.runs, clock_for(device))
    work = {name: 2 * tokens * layer.outputs * size for name, size in (("dense", layer.inputs), ("columns", kept))}
    return {
        "hidden": layer.outputs,
        "inputs": layer.inputs,
        "tokens": tokens,
        "threshold": options.threshold,
        "kept_columns": kept,
        "dtype": options.dtype,
        **timed(times, PAIRS),
        "operations": work,
        "teraflops": {name: work[name] / times.spread(name).median / 1e12 for name in work},
        "of_limit": {
            name: limits.of_limit(times, name, limits.PRODUCT, work[name], best_operations).as_dict() for name in work
        },
    }


if __name__ == "__main__":
    main("column-weight-grad")
