"""The training state of all ranks in one folder: what a run resumes from.

`state.json` says where the run was; the spans (see `spans.py`) hold float32 master weights and, where wanted, AdamW's
moments, by parameter name and position, so that another number of ranks or another ZeRO stage can read them. Random
numbers and the data order are functions of the recipe and the step, and need no state.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cl_dist.errors import ClDistError
from cl_dist.heartbeat import beat
from cl_dist.sharding import Shard, ShardView
from cl_dist.state import atomic
from cl_dist.state.integrity import CheckpointDamaged, StateUnusable, read_sealed, require_format, write_sealed
from cl_dist.state.spans import Span, SpanReader, write_spans
from cl_dist.state.together import together

MASTER = "master"
FORMAT_VERSION = 1


def save_snapshot(
    folder: Path,
    shards: ShardView,
    state: Mapping[str, Any],
    *,
    moments: bool,
    extra: Mapping[str, Mapping[str, Shard]] | None = None,
) -> None:
    """Write the state of all ranks into `folder`, which appears whole or not at all (collective).

    Args:
        folder: Final place; an older snapshot there is replaced after the new one is on the disk.
        shards: The engine's shards.
        state: JSON values to keep beside the tensors.
        moments: Keep AdamW's moments too (inside a task), not only the weights.
        extra: The methods' own tensors, by quantity and parameter.

    Raises:
        ClDistError: The disk is full; what was there before is intact.
    """
    writers = 1 if shards.replicated else torch.distributed.get_world_size()
    tensors = {
        "format": FORMAT_VERSION,
        "writers": writers,
        "moments": moments,
        "optimizer_step": shards.optimizer_step,
    }
    held = {**_quantities(shards, moments), **(extra or {})}
    first = torch.distributed.get_rank() == 0
    try:
        together(lambda: atomic.stage(folder) if first else None)
        together(lambda: _write_own(folder, writers, held))
        together(lambda: _seal(folder, {**state, **tensors}) if first else None)
    except ClDistError:
        if first:  # half a state is of no use, and on a full disk its room is needed
            shutil.rmtree(atomic.staging(folder), ignore_errors=True)
        raise


def _write_own(folder: Path, writers: int, held: Mapping[str, Mapping[str, Shard]]) -> None:
    """Write this rank's spans where it is one of the `writers`."""
    rank = torch.distributed.get_rank()
    if rank < writers:
        write_spans(atomic.staging(folder), rank, {quantity: _spans(pieces) for quantity, pieces in held.items()})


def _seal(folder: Path, state: Mapping[str, Any]) -> None:
    """Add the JSON values and put everything in its place."""
    write_sealed(atomic.staging(folder) / "state.json", state)
    atomic.publish(folder)


def _spans(held: Mapping[str, Shard]) -> dict[str, Span]:
    return {name: Span(shard.start, shard.data) for name, shard in held.items()}


def load_snapshot(
    folder: Path, shards: ShardView, extra: Mapping[str, Mapping[str, Shard]] | None = None
) -> dict[str, Any]:
    """Fill this rank's masters from `folder` and publish the weights (collective).

    Moments are filled where they were kept and are zero otherwise; the methods' own tensors (`extra`) are filled too.
    Everything is checked before anything is filled: where a state is damaged, all ranks raise and none has changed.

    Returns:
        The JSON values that were saved.

    Raises:
        CheckpointDamaged: A file is missing or not what was written.
        StateUnusable: A file cannot be read now, or is another release's; where that shows only while the tensors are
            filled, this process must end.
    """
    state, reader = together(lambda: _checked(folder, shards, extra or {}))
    if state["moments"]:
        shards.allocate_moments(state["optimizer_step"])
    else:
        shards.reset_optimizer()
    held = {**_quantities(shards, state["moments"]), **(extra or {})}
    together(lambda: _fill(reader, held))
    shards.publish()
    return state


def require_intact(folder: Path) -> None:
    """Raise `CheckpointDamaged` on all ranks where a file of a saved state is missing or not what was written
    (collective); `StateUnusable` where one cannot be read now.
    """
    together(lambda: _intact(folder))


def _intact(folder: Path) -> tuple[dict[str, Any], SpanReader]:
    """The JSON values and the tensors of a state, whose files are what was written; the ranks share the reading."""
    state = read_sealed(folder / "state.json")
    require_format(folder, state["format"], FORMAT_VERSION)
    reader = SpanReader(folder, state["writers"])
    reader.verify(torch.distributed.get_rank(), torch.distributed.get_world_size())
    return state, reader


def _fill(reader: SpanReader, held: Mapping[str, Mapping[str, Shard]]) -> None:
    """Read this rank's tensors.

    What was whole a moment ago and is not now is no damage that may be gone round: weights are half filled by then.
    """
    try:
        for quantity, shards in held.items():
            for name, shard in shards.items():
                shard.data.copy_(reader.read(quantity, name, shard.start, shard.stop))
                beat()
    except CheckpointDamaged as error:
        raise StateUnusable(
            f"{error}; it was whole when it was checked: nothing was deleted, --resume tries again"
        ) from error


def _checked(
    folder: Path, shards: ShardView, extra: Mapping[str, Mapping[str, Shard]]
) -> tuple[dict[str, Any], SpanReader]:
    """Read what is not a tensor, and make sure that the tensors are whole and all there for this rank."""
    state, reader = _intact(folder)
    try:
        for quantity, held in {**_quantities(shards, state["moments"]), **extra}.items():
            for name, shard in held.items():
                reader.require(quantity, name, shard.start, shard.stop)
    except CheckpointDamaged as error:
        raise StateUnusable(
            f"{error}, although no file of it is damaged: another release of cl_dist has written it, or another "
            "recipe; nothing was deleted"
        ) from error
    return state, reader


def _quantities(shards: ShardView, moments: bool) -> dict[str, dict[str, Shard]]:
    """This rank's live masters and, where wanted, moments, by quantity and parameter."""
    held: dict[str, dict[str, Shard]] = {MASTER: {}}
    for name in shards.names:
        master = shards.master(name)
        if master is not None:
            held[MASTER][name] = master
        for moment, shard in shards.moments(name).items() if moments else ():
            held.setdefault(moment, {})[name] = shard
    return held
