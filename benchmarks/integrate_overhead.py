#!/usr/bin/env python3
"""A plain DeepSpeed loop inside `cl_dist.continual`, against our own engine's step, as a Markdown table.

Usage:
    python benchmarks/integrate_overhead.py [--stages 2 3] [--ranks 2] [--rounds 40] [--layers 4] [--tokens 128]

Both train a Llama with random weights and MIGU's masks, on the same batch, and stand side by side on every rank. In
every round each takes one whole step, the one that begins alternating; a round counts from a barrier to the end of the
slowest rank. The table has the median of the ratios within a round, and its quartiles. The last column compares the
masters of both after as many steps.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median, quantiles
from typing import Any

from cl_dist.benchmarks.ranks import measure_on_ranks

WARM_UP = 3
"""Rounds before those that count."""


def main() -> None:
    """Measure each stage on ranks of its own, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, nargs="+", choices=(0, 1, 2, 3), default=(2, 3), help="ZeRO stages")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=40, help="steps of each that count, at least 2")
    parser.add_argument("--layers", type=int, default=4, help="transformer blocks")
    parser.add_argument("--tokens", type=int, default=128, help="tokens per rank and step")
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error(f"--rounds {options.rounds}: quartiles need at least 2")
    print("| ZeRO | ranks | own engine | loop in `continual` | loop / own engine (quartiles) | largest difference |")
    print("|---|---|---|---|---|---|")
    for stage in options.stages:
        found = measure_on_ranks(
            "cl_dist.benchmarks.integrate_overhead:measure",
            {"stage": stage, "rounds": options.rounds, "layers": options.layers, "tokens": options.tokens},
            options.ranks,
        )
        low, middle, high = quantiles([b / a for a, b in zip(found["own"], found["loop"], strict=True)], n=4)
        times = " | ".join(f"{median(found[name]) * 1e3:.1f} ms" for name in ("own", "loop"))
        ratio = f"{middle:.3f} ({low:.3f} to {high:.3f})"
        print(f"| {stage} | {options.ranks} | {times} | {ratio} | {found['difference']:g} |", flush=True)


def measure(stage: int, rounds: int, layers: int, tokens: int) -> dict[str, Any]:
    """Seconds of each step of both, the slowest rank's, and how far their masters differ at the end."""
    import deepspeed
    import torch

    import cl_dist
    from cl_dist.benchmarks.engine_steps import MANY_STEPS, batch_of, build_engine, recipe_of
    from cl_dist.benchmarks.training import StepSize, build_model
    from cl_dist.engine.device import device
    from cl_dist.engine.engine import loss_sum
    from cl_dist.engine.settings import build_adamw, deepspeed_config
    from cl_dist.methods.composed import compose
    from cl_dist.methods.migu.config import MiguConfig
    from cl_dist.methods.protocol import TaskPlace
    from cl_dist.tasks.objectives import OBJECTIVES

    size = StepSize(576, 1536, heads=9, key_value_heads=3, layers=layers, tokens=tokens, threshold=0.7)
    world = torch.distributed.get_world_size()
    batch = batch_of(size, seed=torch.distributed.get_rank()).to(device())

    own = build_engine(size, stage, compose([MiguConfig(name="migu", threshold=size.threshold)]))
    own.before_task(TaskPlace(index=1, name="masked", steps=MANY_STEPS))

    recipe = recipe_of(size, stage)
    model: Any = build_model(size, device())
    optimizer = build_adamw(model, recipe.train)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_config(recipe))
    for group in optimizer.param_groups:
        group["lr"] = recipe.train.learning_rate
    forward = OBJECTIVES["causal_lm"].forward

    def loop() -> None:
        loss = loss_sum(*forward(engine, batch, keeps_logits=False)) / batch.targets
        engine.backward(loss)
        engine.step()

    numbers = iter(range(MANY_STEPS))
    ways: dict[str, Callable[[], object]] = {
        "own": lambda: own.train_step(next(numbers), [batch], batch.targets * world),
        "loop": loop,
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    settings: dict[str, Any] = {"threshold": size.threshold, "first_task": "masked"}
    with cl_dist.continual(engine, method="migu", **settings) as session:
        for number in range(WARM_UP + rounds):
            for name in list(ways) if number % 2 else reversed(ways):
                seconds[name].append(_slowest(ways[name]))
        pairs = [(own.shards.master(name), session.shards.master(name)) for name in own.shards.names]
        apart = [float((a.data - b.data).abs().max()) for a, b in pairs if a is not None and b is not None]
    return {
        **{name: times[WARM_UP:] for name, times in seconds.items()},
        "difference": _largest(max(apart, default=0.0)),
    }


def _slowest(step: Callable[[], object]) -> float:
    """Seconds from a barrier until the slowest rank has taken the step."""
    import torch

    torch.distributed.barrier()
    began = time.perf_counter()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return _largest(time.perf_counter() - began)


def _largest(value: float) -> float:
    import torch

    from cl_dist.engine.device import device

    shared = torch.tensor(value, dtype=torch.float64, device=device())
    torch.distributed.all_reduce(shared, op=torch.distributed.ReduceOp.MAX)
    return float(shared)


if __name__ == "__main__":
    main()
