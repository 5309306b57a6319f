"""The training state of all ranks in one folder: what a run resumes from.

`state.json` says where the run was; the spans (see `spans.py`) hold float32 master weights and, where wanted, AdamW's
moments, by parameter name and position, so that another number of ranks or another ZeRO stage can read them. Random
numbers and the data order are functions of the recipe and the step, and need no state.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cl_dist.sharding import ShardView
from cl_dist.state import atomic
from cl_dist.state.integrity import read_sealed, write_sealed
from cl_dist.state.spans import Span, SpanReader, write_spans

MASTER = "master"
MOMENTS = ("exp_avg", "exp_avg_sq")


def save_snapshot(folder: Path, shards: ShardView, state: Mapping[str, Any], *, moments: bool) -> None:
    """Write the state of all ranks into `folder`, which appears whole or not at all (collective).

    Args:
        folder: Final place; an older snapshot there is replaced after the new one is on the disk.
        shards: The engine's shards.
        state: JSON values to keep beside the tensors.
        moments: Keep AdamW's moments too (inside a task), not only the weights.

    Raises:
        ClDistError: The disk is full; what was there before is intact.
    """
    rank = torch.distributed.get_rank()
    if rank == 0:
        atomic.stage(folder)
    torch.distributed.barrier()
    writers = 1 if shards.replicated else torch.distributed.get_world_size()
    if rank < writers:
        write_spans(atomic.staging(folder), rank, _spans(shards, moments))
    torch.distributed.barrier()
    if rank == 0:
        tensors = {"writers": writers, "moments": moments, "optimizer_step": shards.optimizer_step}
        write_sealed(atomic.staging(folder) / "state.json", {**state, **tensors})
        atomic.publish(folder)
    torch.distributed.barrier()


def _spans(shards: ShardView, moments: bool) -> dict[str, dict[str, Span]]:
    spans: dict[str, dict[str, Span]] = {MASTER: {}}
    for name in shards.names:
        master = shards.master(name)
        if master is not None:
            spans[MASTER][name] = Span(master.start, master.data)
        for moment, shard in shards.moments(name).items() if moments else ():
            spans.setdefault(moment, {})[name] = Span(shard.start, shard.data)
    return spans


def load_snapshot(folder: Path, shards: ShardView) -> dict[str, Any]:
    """Fill this rank's masters (and moments, where kept; else zeros) from `folder` and publish the weights
    (collective).

    Returns:
        The JSON values that were saved.

    Raises:
        CheckpointDamaged: A file is missing or not what was written.
    """
    state = read_sealed(folder / "state.json")
    reader = SpanReader(folder, state["writers"])
    reader.verify(torch.distributed.get_rank(), torch.distributed.get_world_size())
    if state["moments"]:
        shards.allocate_moments(state["optimizer_step"])
    else:
        shards.reset_optimizer()
    for name in shards.names:
        views = {MASTER: shards.master(name), **(shards.moments(name) if state["moments"] else {})}
        for quantity, shard in views.items():
            if shard is not None:
                shard.data.copy_(reader.read(quantity, name, shard.start, shard.stop))
    shards.publish()
    return state
