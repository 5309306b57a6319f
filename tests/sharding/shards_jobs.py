"""Rank side of `test_shards.py`: the functions of docs/shards.md on real engines, beside the same model whole."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils import safe_get_full_grad

import cl_dist
from cl_dist.benchmarks.local_views import measure
from cl_dist.engine.distributed import join
from cl_dist.errors import ClDistError
from tests.sharding.jobs import Tiny, _engine

PAGE = Path(__file__).parents[2] / "docs" / "shards.md"
ROWS = [0, 3, 6]
STAGES: dict[str, dict[str, Any]] = {
    "0": {"stage": 0},
    "1": {"stage": 1},
    "2": {"stage": 2},
    "2 offloaded": {"stage": 2, "more": {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}},
    "3": {"stage": 3},
}


def look() -> dict[str, Any]:
    """What the page's functions and the views give, by stage, and what the benchmark measures on a smaller model."""
    join(timeout_seconds=120)
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        exec(block, names)
    found = {name: _look(names, **settings) for name, settings in STAGES.items()}
    return {**found, "benchmark": measure(stage=3, rounds=1, layers=1)}


def _look(page: dict[str, Any], stage: int, more: dict[str, Any] | None = None) -> dict[str, Any]:
    dense = Tiny()
    engine = _engine(copy.deepcopy(dense), stage, False, copy.deepcopy(more or {}))
    for group in engine.optimizer.param_groups:
        group.update(lr=0.1, weight_decay=0.0)
    shards, rank = cl_dist.shards(engine), torch.distributed.get_rank()
    world = torch.distributed.get_world_size()
    found: dict[str, Any] = {"names": shards.names, "moments before": page["second_moments"](engine)}
    x = torch.randn(4 * world, 5, generator=torch.Generator().manual_seed(1))
    dense(x).backward()
    wanted = {name: p.grad.flatten() for name, p in dense.named_parameters() if p.grad is not None}
    found["early"] = _message(lambda: shards.gradient("body.0.weight")) if stage in (1, 2) else ""
    engine.backward(engine(x[4 * rank : 4 * (rank + 1)]))

    # The gradient, against the whole model and against DeepSpeed's own gathering.
    found["error"], found["against deepspeed"], found["elements"] = 0.0, 0.0, 0
    for name in shards.names:
        whole = safe_get_full_grad(engine.module.get_parameter(name)).flatten()
        shard = shards.gradient(name)
        if shard is None:
            continue
        found["elements"] += shard.data.numel()
        found["error"] = max(found["error"], (shard.data - wanted[name][shard.start : shard.stop]).abs().max().item())
        difference = (shard.data - whole[shard.start : shard.stop]).abs().max().item()
        found["against deepspeed"] = max(found["against deepspeed"], difference)
        master = shards.master(name)
        assert master is not None
        assert (master.start, master.stop) == (shard.start, shard.stop)
    norms = page["gradient_norms"](engine)
    found["norm error"] = max(abs(norms[name] - wanted[name].norm().item()) for name in shards.names)

    # The rows of one matrix, through AdamW, whose first step is the sign of the gradient.
    page["keep_rows"](engine, "body.0.weight", ROWS)
    before = _whole(engine, shards, "body.0.weight")
    engine.step()
    moved = (_whole(engine, shards, "body.0.weight") != before).view(7, 5).any(dim=1)
    found["moved rows"] = moved.nonzero().flatten().tolist()
    found["moments after"] = page["second_moments"](engine)

    # A master that was written to is what the model computes with.
    master = shards.master("body.2.bias")
    if master is not None:
        master.data.fill_(0.5)
    shards.publish()
    found["published"] = _whole(engine, shards, "body.2.bias").tolist()
    engine.destroy()
    return found


def _whole(engine: Any, shards: Any, name: str) -> torch.Tensor:
    """The parameter that the model computes with, whole and flat."""
    from deepspeed.runtime.zero import GatheredParameters

    parameter = engine.module.get_parameter(name)
    with GatheredParameters([parameter]):
        return parameter.detach().flatten().clone()


def _message(call: Any) -> str:
    try:
        call()
    except ClDistError as error:
        return str(error)
    return "nothing was refused"
