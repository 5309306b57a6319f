#!/usr/bin/env python3
"""AdamW on the kept rows of a weight: `cl-dist bench optimizer`, or this file as a script."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator

import torch

from cl_dist.benchmarks import limits
from cl_dist.benchmarks.command import main
from cl_dist.benchmarks.harness import Contestant, clock_for, race
from cl_dist.benchmarks.report import Column, Entry, timed
from cl_dist.errors import BadInput
from cl_dist.kernels import AdamWSettings, AdamWState, RowLayout, RowPiece, adamw_rows_

SETTINGS = AdamWSettings(lr=1e-4, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01)
STREAMS = 7
"""Four tensors are read and three written."""
PAIRS = (("rows", "dense"), ("restored", "dense"), ("rows", "restored"))
COLUMNS = (
    Column("elements", "elements"),
    Column("row length", "hidden"),
    Column("kept share", "kept_share", "number"),
    Column("kept rows, ms", "seconds.rows", "milliseconds"),
    Column("torch's fused AdamW, ms", "seconds.dense", "milliseconds"),
    Column("with rows put back, ms", "seconds.restored", "milliseconds"),
    Column("kept rows / torch's", "rows_over_dense", "ratio"),
    Column("put back / torch's", "restored_over_dense", "ratio"),
    Column("kept rows, of the memory's rate", "of_limit.rows", "percent"),
)


def entries(options: Namespace, device: torch.device) -> Iterator[Entry]:
    """Measure each number of elements with each length of a row."""
    for elements in options.elements:
        for length in options.hidden:
            if elements < length:
                raise BadInput(f"--elements {elements}: less than one row of {length}; give --hidden a shorter one")
            yield _entry(elements // length, length, options, device)


def _entry(rows: int, length: int, options: Namespace, device: torch.device) -> Entry:
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, options.dtype)
    param, grad, average = (torch.randn(rows * length, generator=generator).to(device, dtype) for _ in range(3))
    state = AdamWState(param, grad, average, average.square())
    keep = torch.zeros(rows, dtype=torch.bool)
    keep[torch.randperm(rows, generator=generator)[: max(1, round(options.keep * rows))]] = True
    keep, step = keep.to(device), torch.tensor(10.0, device=device)
    piece = RowPiece(0, rows * length, 0, RowLayout(1, rows, length), keep)
    dropped = ~keep

    def put_back() -> None:
        """What froze rows before: save them, step everything, put them back."""
        views = [tensor.view(rows, length) for tensor in (state.param, state.exp_avg, state.exp_avg_sq)]
        saved = [view[dropped] for view in views]
        _dense(state, step)
        for view, before in zip(views, saved, strict=True):
            view[dropped] = before

    contestants = {
        "rows": Contestant(lambda: adamw_rows_(state, step, [piece], SETTINGS)),
        "dense": Contestant(lambda: _dense(state, step)),
        "restored": Contestant(put_back),
    }
    moved = STREAMS * int(keep.sum()) * length * param.element_size()
    best, best_moved = limits.updating(moved, device)
    times = race({**contestants, limits.UPDATE: best}, options.runs, clock_for(device))
    return {
        "elements": rows * length,
        "hidden": length,
        "kept_share": float(keep.float().mean()),
        "dtype": options.dtype,
        **timed(times, PAIRS),
        **limits.memory_rates(times, ["rows"], limits.UPDATE, moved, best_moved),
    }


def _dense(state: AdamWState, step: torch.Tensor) -> None:
    """Torch's fused AdamW on everything."""
    torch._fused_adamw_(
        [state.param], [state.grad], [state.exp_avg], [state.exp_avg_sq], [], [step],
        lr=SETTINGS.lr, beta1=SETTINGS.beta1,
        beta2=SETTINGS.beta2, weight_decay=SETTINGS.weight_decay, eps=SETTINGS.eps, amsgrad=False, maximize=False,
    )  # fmt: skip


if __name__ == "__main__":
    main("optimizer")
