"""Rank side of test_compact: the same training with and without packing, and what each sends."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from cl_dist.benchmarks.plan_accuracy import Collectives
from cl_dist.engine.distributed import join
from cl_dist.methods.protocol import TaskPlace
from cl_dist.sharding import ShardView
from tests.distributed.exactness_jobs import QUANTITIES, Case
from tests.distributed.worlds import micro_batches, samples, together, whole


def run_cases(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Train every case both ways; report how far apart they end and the bytes of the last step by collective."""
    join(timeout_seconds=120)
    return [compared(case) for case in cases]


def compared(settings: dict[str, Any]) -> dict[str, Any]:
    """One case."""
    auto, off = (trained(settings, compact) for compact in ("auto", "off"))
    difference = {
        quantity: max(float(distances(auto[quantity][name], tensor).max()) for name, tensor in off[quantity].items())
        for quantity in (*QUANTITIES, "measured")
    }
    norms = [abs(one - other) / other for one, other in zip(auto["norms"], off["norms"], strict=True)]
    return {
        "difference": difference,
        "norms": max(norms),
        "bytes": {"auto": auto["bytes"], "off": off["bytes"]},
        "message": {"auto": auto["message"], "off": off["message"]},
        "replicas": auto["replicas"],
        "left": auto["left"],
        **auto["elements"],
    }


def whole_gradients(shards: ShardView) -> dict[str, torch.Tensor]:
    """The reduced gradient of every parameter."""
    held = {name: shards.own_gradient(name) for name in shards.names}
    return together({name: shard for name, shard in held.items() if shard is not None}, shards)


def distances(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Relative where a number is larger than one."""
    return (one - other).abs() / other.abs().clamp(min=1.0)


def trained(settings: dict[str, Any], compact: str) -> dict[str, Any]:
    """Masters and moments after the last step, whole; norms of every step; the last step's bytes by collective."""
    case = Case(**settings, compact=compact, steps=2)
    engine: Any = case.engine
    engine.method.methods = [case.migu]  # what the recorder gathers would count too
    engine.before_task(TaskPlace(index=0, name="t", steps=case.steps))
    sent: Counter[str] = Counter()
    norms = []
    for step in range(case.steps):
        per_rank = case.micro * case.accumulation
        batch = samples(case.family, per_rank * case.world, seed=step)
        mine = micro_batches(case.family, batch[case.rank * per_rank : (case.rank + 1) * per_rank], case.micro)
        targets = torch.tensor(float(sum(each.targets for each in mine)))
        torch.distributed.all_reduce(targets)
        with Collectives() as counter:
            engine.train_step(step, mine, int(targets))
        sent = counter.bytes
        norms.append(float(engine._engine.get_global_grad_norm() or 1.0))
    measured: dict[str, torch.Tensor] = {}
    case.migu._executor._exchange.choose(case.migu.keep)  # as if in the middle of a step
    engine.measure(mine, int(targets), "probe", lambda: measured.update(whole_gradients(engine.shards)))
    case.migu._executor._exchange.clear()
    weights = torch.cat([param.detach().flatten() for param in engine.model.parameters()])
    lowest, highest = weights.clone(), weights.clone()
    torch.distributed.all_reduce(lowest, op=torch.distributed.ReduceOp.MIN)
    torch.distributed.all_reduce(highest, op=torch.distributed.ReduceOp.MAX)
    report: dict[str, Any] = {quantity: whole(engine.shards, quantity) for quantity in QUANTITIES}
    report["measured"] = measured
    numels = {name: engine.shards.numel(name) for name in engine.shards.names}
    dropped = {name: int((~keep).sum()) * (numels[name] // len(keep)) for name, keep in case.migu.keep.items()}
    report["elements"] = {
        "dropped": sum(dropped.values()),
        "tracked": sum(numels[name] for name in dropped),
        "parameters": len(numels),
    }
    zero = engine._engine.optimizer
    case.migu.detach()
    report |= {
        "bytes": dict(sent),
        "norms": norms,
        "message": case.migu.start_message(),
        "replicas": bool(torch.equal(lowest, highest)) if settings["stage"] < 3 else True,
        "left": [name for owner in (zero, engine._engine) for name in SEAMS if name in vars(owner)],
    }
    engine.destroy()
    return report


SEAMS = (
    "average_tensor", "allreduce_and_scatter", "allreduce_no_retain", "gradient_reduction_w_predivide", "step",
    "_DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads",
)  # fmt: skip
