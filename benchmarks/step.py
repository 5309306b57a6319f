#!/usr/bin/env python3
"""A training step, masked and dense; with `--selector` the optimiser too: `cl-dist bench step`, or run this file."""

from __future__ import annotations

import gc
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from cl_dist.benchmarks import limits
from cl_dist.benchmarks.command import main
from cl_dist.benchmarks.harness import clock_for, race
from cl_dist.benchmarks.report import Column, Entry, timed
from cl_dist.benchmarks.shapes import MODELS, Model, default_blocks, model_of
from cl_dist.benchmarks.step_memory import peaks
from cl_dist.benchmarks.step_ranks import DEFAULT_STAGE, race_on_ranks
from cl_dist.benchmarks.step_selectors import entry_of
from cl_dist.benchmarks.training import WAYS, Masked, StepSize, Way, build_model, operations, token_ids
from cl_dist.errors import ClDistError

PAIRS = (("masked", "dense"), ("masked", "reference"), ("reference", "dense"))
COLUMNS = (
    Column("hidden", "hidden"),
    Column("MLP", "intermediate"),
    Column("layers", "layers"),
    Column("tokens", "tokens"),
    Column("dense, ms", "seconds.dense", "milliseconds"),
    Column("masked, ms", "seconds.masked", "milliseconds"),
    Column("selected, ms", "seconds.selected", "milliseconds"),
    Column("reference, ms", "seconds.reference", "milliseconds"),
    Column("masked / dense", "masked_over_dense", "ratio"),
    Column("selected / dense", "selected_over_dense", "ratio"),
    Column("kept share", "kept_share", "number"),
    Column("state, share of dense", "state_share", "number"),
    Column("dense, state", "state_bytes_per_rank.dense", "bytes"),
    Column("selected, state", "state_bytes_per_rank.selected", "bytes"),
    Column("arithmetic alone", "arithmetic_limit", "number"),
    Column("masked / reference", "masked_over_reference", "ratio"),
    Column("reference / dense", "reference_over_dense", "ratio"),
    Column("dense, of the peak", "of_limit.dense", "percent"),
    Column("masked, of the peak", "of_limit.masked", "percent"),
    Column("dense, memory", "peak_memory_bytes.dense", "bytes"),
    Column("masked, memory", "peak_memory_bytes.masked", "bytes"),
    Column("gradient error", "gradient_error", "scientific"),
)


def entries(options: Namespace, device: torch.device) -> Iterator[Entry]:
    """Measure the sizes one after the other; the memory of each is released before the next."""
    for widths in _widths(options):
        for tokens in options.tokens:
            size = _size(widths, tokens, options)
            if options.selector is not None:
                yield entry_of(size, options)
            else:
                yield _on_ranks(size, options) if options.processes else _in_process(size, options, device)
            gc.collect()


def _widths(options: Namespace) -> list[Model]:
    if options.shapes is not None:
        return [MODELS[options.shapes]]
    return [model_of(hidden, options.intermediate) for hidden in options.hidden]


def _size(widths: Model, tokens: int, options: Namespace) -> StepSize:
    return StepSize(
        hidden=widths.hidden,
        intermediate=widths.intermediate,
        heads=widths.heads,
        key_value_heads=widths.key_value_heads,
        layers=options.layers or default_blocks(widths.hidden),
        tokens=tokens,
        threshold=options.threshold,
        dtype=options.dtype,
        lora=options.lora,
    )


def _in_process(size: StepSize, options: Namespace, device: torch.device) -> Entry:
    model, ids = build_model(size, device), token_ids(size).to(device)
    work = operations(model, size)
    # The hardware's peak runs as one more contestant, in the same rounds.
    best, best_operations = limits.product(getattr(torch, size.dtype), device)
    contestants = {name: way(model, ids, size.threshold).contestant() for name, way in WAYS.items()}
    times = race({**contestants, limits.PRODUCT: best}, options.runs, clock_for(device))
    shares = {
        name: limits.of_limit(times, name, limits.PRODUCT, work[name], best_operations).as_dict() for name in work
    }
    entry = {
        **asdict(size),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        **timed(times, PAIRS),
        "operations": work,
        "arithmetic_limit": work["masked"] / work["dense"],
        "of_limit": shares,
        **compare_gradients(model, ids, size.threshold),
    }
    # Peak memory is measured in fresh processes, which need this process's memory.
    del model, contestants
    gc.collect()
    return {**entry, **(peaks(size, device) if options.memory == "yes" else {})}


def _on_ranks(size: StepSize, options: Namespace) -> Entry:
    stage = DEFAULT_STAGE if options.zero_stage is None else options.zero_stage
    times, threads = race_on_ranks(size, stage, options)
    return {
        **asdict(size),
        "processes": options.processes,
        "zero_stage": stage,
        "threads_per_rank": threads,
        **timed(times, PAIRS[:1]),
        "masked_over_reference": None,
        "reference_over_dense": None,
    }


def compare_gradients(model: nn.Module, ids: torch.Tensor, threshold: float) -> dict[str, Any]:
    """Compare the gradients of a masked step with those of a dense step that is masked after backward.

    Returns:
        `gradient_error`: the largest difference, relative to the largest entry of the parameter's dense gradient.

    Raises:
        ClDistError: An entry of a masked row is not exactly zero.
    """
    masked, dense = Masked(model, ids, threshold), Way(model, ids, threshold)
    skipping, whole = _gradients(masked), _gradients(dense)
    worst = 0.0
    for name, gradient in whole.items():
        scale = gradient.abs().max().clamp(min=torch.finfo(gradient.dtype).tiny)
        layer, _, kind = name.rpartition(".")
        if layer in masked.masks and kind in ("weight", "bias"):
            dropped = ~masked.masks[layer].keep
            if bool((skipping[name][dropped] != 0).any()):
                raise ClDistError(f"the gradient of {name} is not zero in masked rows")
            gradient[dropped] = 0
        worst = max(worst, float(skipping[name].sub_(gradient).abs_().max() / scale))
    model.zero_grad(set_to_none=True)
    return {"gradient_error": worst}


def _gradients(way: Way) -> dict[str, torch.Tensor]:
    """The gradients of all trained parameters after one step."""
    way.prepare()
    way.step()
    way.remove()
    gradients = {name: parameter.grad for name, parameter in way.model.named_parameters() if parameter.requires_grad}
    way.model.zero_grad(set_to_none=True)
    return {name: gradient for name, gradient in gradients.items() if gradient is not None}


if __name__ == "__main__":
    main("step")
