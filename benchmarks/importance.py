#!/usr/bin/env python3
"""One update of smoothed importance and uncertainty: `cl-dist bench importance`, or this file as a script."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch

from cl_dist.benchmarks import limits
from cl_dist.benchmarks.command import main
from cl_dist.benchmarks.harness import Contestant, clock_for, race
from cl_dist.benchmarks.memory import growth
from cl_dist.benchmarks.options import MEBI
from cl_dist.benchmarks.report import Column, Entry, timed
from cl_dist.kernels import importance_update_, reference

BETA = 0.85
STREAMS = 6
"""Four tensors are read and two written."""
ELEMENTS = (16 * MEBI,)
PAIRS = (("fused", "reference"), ("fused", "in_place"))
COLUMNS = (
    Column("elements", "elements"),
    Column("order", "order"),
    Column("fused, ms", "seconds.fused", "milliseconds"),
    Column("in place, ms", "seconds.in_place", "milliseconds"),
    Column("reference, ms", "seconds.reference", "milliseconds"),
    Column("fused / reference", "fused_over_reference", "ratio"),
    Column("fused / in place", "fused_over_in_place", "ratio"),
    Column("of the memory's rate", "of_limit.fused", "percent"),
    Column("parameter", "parameter_bytes", "bytes"),
    Column("fused, memory", "extra_bytes.fused", "bytes"),
    Column("reference, memory", "extra_bytes.reference", "bytes"),
)


class Operands(NamedTuple):
    """The flat tensors that an update reads and writes."""

    param: torch.Tensor
    grad: torch.Tensor
    smoothed: torch.Tensor
    uncertainty: torch.Tensor

    def fresh_states(self) -> None:
        """Reset to zero: after many updates with one gradient the uncertainty is denormal, which is slow."""
        self.smoothed.zero_()
        self.uncertainty.zero_()


def entries(options: Namespace, device: torch.device) -> Iterator[Entry]:
    """Measure each number of elements."""
    squares = None if options.hidden is None else [width * width for width in options.hidden]
    for elements in options.elements or squares or ELEMENTS:
        yield _entry(elements, options, device)


def _entry(elements: int, options: Namespace, device: torch.device) -> Entry:
    operands = _operands(elements, getattr(torch, options.dtype), device)
    temporary = torch.empty_like(operands.param)
    moved = STREAMS * elements * operands.param.element_size()
    best, best_moved = limits.updating(moved, device)
    ways: dict[str, Callable[[], object]] = {
        "fused": partial(importance_update_, *operands, order=options.order),
        "reference": partial(reference.importance_update_, *operands, order=options.order),
        "in_place": partial(in_place_chain, operands, temporary, options.order),
    }
    contestants = {name: Contestant(way, prepare=operands.fresh_states) for name, way in ways.items()}
    times = race({**contestants, limits.UPDATE: best}, options.runs, clock_for(device))
    return {
        "elements": elements,
        "order": options.order,
        "dtype": options.dtype,
        **timed(times, PAIRS),
        **limits.memory_rates(times, list(contestants), limits.UPDATE, moved, best_moved),
        "parameter_bytes": elements * operands.param.element_size(),
        "extra_bytes": {name: growth(ways[name], device) for name in ("fused", "reference")},
    }


def _operands(elements: int, dtype: torch.dtype, device: torch.device) -> Operands:
    generator = torch.Generator().manual_seed(0)
    param, grad = (torch.randn(elements, generator=generator).to(device, dtype) for _ in range(2))
    return Operands(param, grad, torch.zeros_like(param), torch.zeros_like(param))


def in_place_chain(operands: Operands, temporary: torch.Tensor, order: str) -> None:
    """The best chain of torch operations: in place, with one preallocated temporary tensor."""
    param, grad, smoothed, uncertainty = operands
    importance = torch.mul(param, grad, out=temporary)
    if order == "second":
        importance.square_()
    elif order == "mixed":
        importance.addcmul_(importance, importance, value=-0.5)
    importance.abs_()
    smoothed.lerp_(importance, 1 - BETA)
    uncertainty.lerp_(importance.sub_(smoothed).abs_(), 1 - BETA)


if __name__ == "__main__":
    main("importance")
