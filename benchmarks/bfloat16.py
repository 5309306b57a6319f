#!/usr/bin/env python3
"""bfloat16 products on a CPU without instructions for them: `cl-dist bench bfloat16`, or this file as a script."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator

import torch

from cl_dist.benchmarks.command import main
from cl_dist.benchmarks.harness import Contestant, clock_for, race
from cl_dist.benchmarks.report import Column, Entry, timed
from cl_dist.benchmarks.shapes import Layer, layers_of
from cl_dist.models.bfloat16 import in_float32, lacks_instructions

PRODUCTS = ("output", "input_gradient", "weight_gradient")
PAIRS = tuple((f"{product}_mended", f"{product}_torch") for product in PRODUCTS)
COLUMNS = (
    Column("rows", "hidden"),
    Column("inputs", "inputs"),
    Column("tokens", "tokens"),
    Column("torch: output, ms", "seconds.output_torch", "milliseconds"),
    Column("input gradient, ms", "seconds.input_gradient_torch", "milliseconds"),
    Column("weight gradient, ms", "seconds.weight_gradient_torch", "milliseconds"),
    Column("mended / torch: output", "output_mended_over_output_torch", "ratio"),
    Column("input gradient", "input_gradient_mended_over_input_gradient_torch", "ratio"),
    Column("weight gradient", "weight_gradient_mended_over_weight_gradient_torch", "ratio"),
    Column("lacks the instructions", "lacks_instructions"),
)


def entries(options: Namespace, device: torch.device) -> Iterator[Entry]:
    """Measure each layer with each number of tokens."""
    for layer in layers_of(options.hidden, options.shapes):
        for tokens in options.tokens:
            yield _entry(layer, tokens, options, device)


def _entry(layer: Layer, tokens: int, options: Namespace, device: torch.device) -> Entry:
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    x_TI, dy_TO, weight_OI = (
        drawn(tokens, layer.inputs),
        drawn(tokens, layer.outputs),
        drawn(layer.outputs, layer.inputs),
    )
    operands = {
        "output": (x_TI, weight_OI.t()),
        "input_gradient": (dy_TO, weight_OI),
        "weight_gradient": (dy_TO.t(), x_TI),
    }
    contestants = {}
    for name, (a, b) in operands.items():
        contestants[f"{name}_torch"] = Contestant(lambda a=a, b=b: a @ b)  # type: ignore[misc]
        contestants[f"{name}_mended"] = Contestant(lambda a=a, b=b: in_float32(a, b))  # type: ignore[misc]
    times = race(contestants, options.runs, clock_for(device))
    return {
        "hidden": layer.outputs,
        "inputs": layer.inputs,
        "tokens": tokens,
        "dtype": options.dtype,
        "lacks_instructions": lacks_instructions(),
        **timed(times, PAIRS),
    }


if __name__ == "__main__":
    main("bfloat16")
