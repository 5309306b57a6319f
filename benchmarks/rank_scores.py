#!/usr/bin/env python3
"""Scores of a LoRA module's ranks: `cl-dist bench rank-scores`, or this file as a script."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator

import torch
from cl_dist.benchmarks import limits
from cl_dist.benchmarks.command import main
from cl_dist.benchmarks.harness import Contestant, clock_for, race
from cl_dist.benchmarks.report import Column, Entry, timed
from cl_dist.benchmarks.shapes import Layer, layers_of
from cl_dist.kernels import rank_unit_scores, reference

PAIRS = (("means", "reference"), ("means", "torch"))
COLUMNS = (
    Column("outputs", "hidden"),
    Column("inputs", "inputs"),
    Column("rank", "rank"),
    Column("means, ms", "seconds.means", "milliseconds"),
    Column("reference, ms", "seconds.reference", "milliseconds"),
    Column("speed-up", "speedup", "ratio"),
    Column("means / torch's operations", "means_over_torch", "ratio"),
    Column("of the memory's rate", "of_limit.means", "percent"),
    Column("largest difference", "error", "scientific"),
)


def entries(options: Namespace, device: torch.device) -> Iterator[Entry]:
    """Measure a LoRA module on each layer."""
    for layer in layers_of(options.hidden, options.shapes):
        yield _entry(layer, options, device)


def _entry(layer: Layer, options: Namespace, device: torch.device) -> Entry:
    states = _states(layer, options.rank, getattr(torch, options.dtype), device)
    moved = sum(state.numel() * state.element_size() for state in states)
    best, best_moved = limits.reading(moved, device)
    contestants = {
        "means": Contestant(lambda: rank_unit_scores(*states)),
        "reference": Contestant(lambda: reference.rank_unit_scores(*states)),
        "torch": Contestant(lambda: shortest_chain(*states)),
        limits.READ: best,
    }
    times = race(contestants, options.runs, clock_for(device))
    return {
        "hidden": layer.outputs,
        "inputs": layer.inputs,
        "rank": options.rank,
        "dtype": options.dtype,
        **timed(times, PAIRS),
        "speedup": times.ratio("reference", "means").as_dict(),
        "error": _error(rank_unit_scores(*states), reference.rank_unit_scores(*states)),
        **limits.memory_rates(times, ["means"], limits.READ, moved, best_moved),
    }


def _states(layer: Layer, rank: int, dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
    """Smoothed importance and uncertainty of A (r, in), then of B (out, r); all nonnegative."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(rank, layer.inputs)] * 2 + [(layer.outputs, rank)] * 2
    return [torch.rand(shape, generator=generator).to(device, dtype) for shape in shapes]


def _error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference, relative to the largest score."""
    return float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max())


def shortest_chain(
    a_smoothed: torch.Tensor, a_uncertainty: torch.Tensor, b_smoothed: torch.Tensor, b_uncertainty: torch.Tensor
) -> torch.Tensor:
    """The product of means with torch operations, in the precision of the states."""
    a, b = a_smoothed * a_uncertainty, b_smoothed * b_uncertainty
    return a.mean(dim=1) * b.mean(dim=0)


if __name__ == "__main__":
    main("rank-scores")
