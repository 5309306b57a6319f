#!/usr/bin/env python3
"""Row magnitude of a linear layer's output: `cl-dist bench magnitude`, or this file as a script."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator

import torch
from torch import nn

from cl_dist.benchmarks import limits
from cl_dist.benchmarks.command import main
from cl_dist.benchmarks.harness import Contestant, clock_for, race
from cl_dist.benchmarks.report import Column, Entry, timed
from cl_dist.benchmarks.shapes import Layer, layers_of
from cl_dist.kernels import reference, row_magnitude

PAIRS = (("fused", "reference"), ("fused", "torch"), ("fused", "linear"))
COLUMNS = (
    Column("rows", "hidden"),
    Column("inputs", "inputs"),
    Column("tokens", "tokens"),
    Column("fused, ms", "seconds.fused", "milliseconds"),
    Column("reference, ms", "seconds.reference", "milliseconds"),
    Column("fused / reference", "fused_over_reference", "ratio"),
    Column("fused / torch's operations", "fused_over_torch", "ratio"),
    Column("fused / the layer's product", "fused_over_linear", "ratio"),
    Column("of the memory's rate", "of_limit.fused", "percent"),
)


def entries(options: Namespace, device: torch.device) -> Iterator[Entry]:
    """Measure each layer with each number of tokens."""
    for layer in layers_of(options.hidden, options.shapes):
        for tokens in options.tokens:
            yield _entry(layer, tokens, options, device)


def _entry(layer: Layer, tokens: int, options: Namespace, device: torch.device) -> Entry:
    dtype = getattr(torch, options.dtype)
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(tokens, layer.inputs, generator=generator, device=device).to(dtype)
    weight = torch.randn(layer.outputs, layer.inputs, generator=generator, device=device).to(dtype)
    y = nn.functional.linear(x, weight)
    moved = y.numel() * y.element_size()
    best, best_moved = limits.reading(moved, device)
    contestants = {
        "fused": Contestant(lambda: row_magnitude(y)),
        "reference": Contestant(lambda: reference.row_magnitude(y)),
        "torch": Contestant(lambda: shortest_chain(y)),
        "linear": Contestant(lambda: nn.functional.linear(x, weight)),
        limits.READ: best,
    }
    times = race(contestants, options.runs, clock_for(device))
    return {
        "hidden": layer.outputs,
        "inputs": layer.inputs,
        "tokens": tokens,
        "dtype": options.dtype,
        **timed(times, PAIRS),
        **limits.memory_rates(times, ["fused"], limits.READ, moved, best_moved),
    }


def shortest_chain(y_TO: torch.Tensor) -> torch.Tensor:
    """The shortest chain of torch operations: one temporary, and a matrix product instead of division and sum."""
    magnitude_TO = y_TO.abs()
    return magnitude_TO.sum(dim=1, keepdim=True).reciprocal_().t().mm(magnitude_TO)[0]


if __name__ == "__main__":
    main("magnitude")
