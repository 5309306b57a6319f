#!/usr/bin/env python3
"""Time to read all gradients on local shards, against DeepSpeed's gathering of them, as a Markdown table.

Usage:
    python benchmarks/local_views.py [--stages 2 3] [--ranks 2] [--rounds 5] [--layers 30]

The model has the shape of SmolLM2-135M and random weights. After a backward pass, three ways of reading every
parameter's gradient take turns on the same gradients: the views of `cl_dist.shards`; the norm of every parameter, from
the views and one all-reduce; and `deepspeed.utils.safe_get_full_grad`. Before that, all views are compared with the
gathered gradients. A round counts from a barrier to the end of the slowest rank; the table has medians.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

from cl_dist.benchmarks.ranks import measure_on_ranks

TOKENS = 16
"""Tokens per rank of the only batch: what is read does not depend on it."""


def main() -> None:
    """Measure each stage on ranks of its own, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, nargs="+", choices=(0, 1, 2, 3), default=(2, 3), help="ZeRO stages")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5, help="how often each way is timed, after one warm-up")
    parser.add_argument("--layers", type=int, default=30, help="transformer blocks")
    options = parser.parse_args()
    print("| ZeRO | ranks | parameters | views | norms from views | `safe_get_full_grad` | largest difference |")
    print("|---|---|---|---|---|---|---|")
    for stage in options.stages:
        found = measure_on_ranks(
            "cl_dist.benchmarks.local_views:measure",
            {"stage": stage, "rounds": options.rounds, "layers": options.layers},
            options.ranks,
        )
        times = (f"{found[name] * 1e3:.1f} ms" for name in ("views", "norms", "gathered"))
        print(
            f"| {stage} | {options.ranks} | {found['parameters'] / 1e6:.1f} M in {found['tensors']} | "
            f"{' | '.join(times)} | {found['difference']:g} |",
            flush=True,
        )


def measure(stage: int, rounds: int, layers: int) -> dict[str, Any]:
    """Seconds of each way on this rank's engine, the slowest rank's, and how far views and gathering differ."""
    import torch
    from deepspeed.utils import safe_get_full_grad

    import cl_dist

    engine = _engine(stage, layers)
    ids = torch.randint(100, 40000, (1, TOKENS), device=engine.device)
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    shards = cl_dist.shards(engine)
    parameters = dict(engine.module.named_parameters())

    def norms() -> None:
        pieces = [shards.gradient(name) for name in shards.names]
        sums = [torch.zeros(()) if each is None else each.data.float().square().sum().cpu() for each in pieces]
        shards.sum_over_ranks(torch.stack(sums).to(engine.device))

    ways: dict[str, Callable[[], object]] = {
        "views": lambda: [shards.gradient(name) for name in shards.names],
        "norms": norms,
        "gathered": lambda: [safe_get_full_grad(parameters[name]) for name in shards.names],
    }
    difference = 0.0
    for name in shards.names:
        whole, shard = safe_get_full_grad(parameters[name]).flatten(), shards.gradient(name)
        if shard is not None:
            own = whole[shard.start : shard.stop].to(shard.data.device)
            difference = max(difference, (own - shard.data).abs().max().item())

    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, read in ways.items():
            seconds[name].append(_slowest(read, engine.device))
    return {
        **{name: median(times[1:]) for name, times in seconds.items()},
        "difference": _largest(difference, engine.device),
        "tensors": len(shards.names),
        "parameters": sum(shards.shape(name).numel() for name in shards.names),
    }


def _slowest(read: Callable[[], object], device: Any) -> float:
    """Seconds from a barrier until the slowest rank has read everything."""
    import torch

    torch.distributed.barrier()
    began = time.perf_counter()
    read()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return _largest(time.perf_counter() - began, device)


def _largest(value: float, device: Any) -> float:
    import torch

    shared = torch.tensor(value, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(shared, op=torch.distributed.ReduceOp.MAX)
    return float(shared)


def _engine(stage: int, layers: int) -> Any:
    """A DeepSpeed engine around a model of the shape of SmolLM2-135M with random weights, in float32."""
    import deepspeed
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from cl_dist.models.published import SMOLLM2_135M

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**SMOLLM2_135M, "num_hidden_layers": layers}))
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    return engine


if __name__ == "__main__":
    main()
