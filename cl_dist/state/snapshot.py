"""The training state of all ranks in one folder: what a run resumes from.

`state.json` has the position in the run. The spans (see `spans.py`) hold the float32 master weights and, optionally,
AdamW's moments, by parameter name and position, so that a different number of ranks or ZeRO stage can read them. Random
numbers and the data order are functions of the recipe and the step, and need no state.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import torch

from cl_dist.errors import ClDistError
from cl_dist.heartbeat import beat
from cl_dist.sharding import Shard, ShardView
from cl_dist.state import atomic
from cl_dist.state.collective_failure import fail_together, on_first_rank
from cl_dist.state.integrity import CheckpointDamaged, StateUnusable, read_sealed, require_format, write_sealed
from cl_dist.state.spans import Part, Span, SpanIndex, SpanReader, verified_share, write_spans

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
    """Write the state of all ranks to `folder`, all or nothing (collective).

    Args:
        folder: Final path; an older snapshot there is replaced once the new one is on disk.
        shards: The engine's shards.
        state: JSON values to save with the tensors.
        moments: Save AdamW's moments too (inside a task), not only the weights.
        extra: The methods' own tensors, by quantity and parameter.

    Raises:
        ClDistError: The disk is full; the older snapshot is intact.
    """
    described = {**state, "moments": moments, "optimizer_step": shards.optimizer_step}
    save_tensors(folder, {**_quantities(shards, moments), **(extra or {})}, described, replicated=shards.replicated)


def save_tensors(
    folder: Path, held: Mapping[str, Mapping[str, Shard]], state: Mapping[str, Any], *, replicated: bool
) -> None:
    """Write tensors of all ranks to `folder`, all or nothing (collective); `load_tensors` reads them.

    Args:
        folder: Final path; an older one is replaced once the new one is on disk.
        held: What this rank holds, by quantity and parameter.
        state: JSON values to save with the tensors.
        replicated: Whether every rank holds everything, so that rank 0 writes for all.

    Raises:
        ClDistError: The disk is full; what was there is intact.
    """
    writers = 1 if replicated else torch.distributed.get_world_size()
    first = torch.distributed.get_rank() == 0
    described = {**state, "format": FORMAT_VERSION, "writers": writers}
    try:
        fail_together(lambda: atomic.stage(folder) if first else None)
        fail_together(lambda: _write_own(folder, writers, held))
        fail_together(lambda: _seal(folder, described) if first else None)
    except ClDistError:
        if first:  # half a state is useless, and takes space on a full disk
            shutil.rmtree(atomic.staging(folder), ignore_errors=True)
        raise


def _write_own(folder: Path, writers: int, held: Mapping[str, Mapping[str, Shard]]) -> None:
    """Write this rank's spans, if it is one of the `writers`."""
    rank = torch.distributed.get_rank()
    if rank < writers:
        spans = {
            quantity: {name: Span(shard.start, shard.data) for name, shard in shards.items()}
            for quantity, shards in held.items()
        }
        write_spans(atomic.staging(folder), rank, spans)


def _seal(folder: Path, state: Mapping[str, Any]) -> None:
    """Add the JSON values and publish the folder."""
    write_sealed(atomic.staging(folder) / "state.json", state)
    # Each rank has flushed its own files, and the folder was flushed with the last of them. To do so again for all
    # would take this rank longer the more ranks there are, while they wait.
    atomic.publish(folder, synced=True)


def load_snapshot(
    folder: Path,
    shards: ShardView,
    extra: Mapping[str, Mapping[str, Shard]] | None = None,
    later: Set[str] = frozenset(),
) -> dict[str, Any]:
    """Load this rank's master weights from `folder` and publish the weights (collective).

    Also loads the moments, which become zero if they were not saved, and the methods' own tensors (`extra`); quantities
    in `later` are left as they are if none was saved. Everything is checked before anything is loaded: if a state is
    damaged, all ranks raise and none has changed.

    Returns:
        The JSON values that were saved.

    Raises:
        CheckpointDamaged: A file is missing or differs from what was written.
        StateUnusable: A file cannot be read now, or another release wrote it. If this happens while tensors are being
            loaded, the weights are incomplete and the process must end.
    """
    state, parts = _intact(folder)
    # Each rank has read its share of the indexes: rank 0 puts them together and tells everyone where everything is.
    reader = SpanReader(folder, index=_exchanged(SpanIndex.of(parts)))
    extra = {name: own for name, own in (extra or {}).items() if name not in later or reader.parameters(name)}
    held = {**_quantities(shards, state["moments"]), **extra}
    fail_together(lambda: _require(reader, held))
    if state["moments"]:
        shards.allocate_moments(state["optimizer_step"])
    else:
        shards.reset_optimizer()
    held = {**_quantities(shards, state["moments"]), **extra}
    fail_together(lambda: _fill(reader, held))
    shards.publish()
    return state


def load_tensors(
    folder: Path, held: Mapping[str, Mapping[str, Shard]], later: Set[str] = frozenset()
) -> dict[str, Any]:
    """Fill live tensors with what `save_tensors` wrote, on any number of ranks (collective); all are checked first.

    Args:
        folder: What `save_tensors` wrote.
        held: The tensors that this rank needs, by quantity and parameter.
        later: Quantities that are left as they are if none was saved.

    Returns:
        The JSON values that were saved.

    Raises:
        CheckpointDamaged: A file is missing or differs from what was written; nothing has changed.
        StateUnusable: A file cannot be read now, or another release wrote it.
    """
    state, parts = _intact(folder)
    reader = SpanReader(folder, index=_exchanged(SpanIndex.of(parts)))
    held = {name: own for name, own in held.items() if name not in later or reader.parameters(name)}
    fail_together(lambda: _require(reader, held))
    fail_together(lambda: _fill(reader, held))
    return state


def require_intact(folder: Path) -> None:
    """Check the files of a saved state (collective).

    Raises `CheckpointDamaged` on all ranks if one is missing or differs from what was written, `StateUnusable` if one
    cannot be read now.
    """
    _intact(folder)


def _intact(folder: Path) -> tuple[dict[str, Any], list[Part]]:
    """The JSON values, read by one rank, and this rank's share of the indexes, once all ranks have verified theirs."""
    state = on_first_rank(lambda: _read_state(folder))
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return state, fail_together(lambda: verified_share(folder, state["writers"], rank, world))


def _read_state(folder: Path) -> dict[str, Any]:
    state: dict[str, Any] = read_sealed(folder / "state.json")
    require_format(folder, state["format"], FORMAT_VERSION)
    return state


def _exchanged(own: SpanIndex) -> SpanIndex:
    """The index of everything that the ranks have read (collective)."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    every: list[Any] = [None] * world
    torch.distributed.gather_object(own, every if rank == 0 else None)
    shared: list[Any] = [SpanIndex.merged(every) if rank == 0 else None]
    torch.distributed.broadcast_object_list(shared)
    whole: SpanIndex = shared[0]
    return whole


def _fill(reader: SpanReader, held: Mapping[str, Mapping[str, Shard]]) -> None:
    """Read this rank's tensors.

    Damage that appears only now, after the check, must not lead to a fallback: half of the weights are already loaded.
    """
    try:
        for quantity, shards in held.items():
            for name, shard in shards.items():
                shard.data.copy_(reader.read(quantity, name, shard.start, shard.stop))
                beat()
    except CheckpointDamaged as error:
        raise StateUnusable(
            f"{error}; it was intact when it was checked: nothing was deleted, --resume tries again"
        ) from error


def _require(reader: SpanReader, held: Mapping[str, Mapping[str, Shard]]) -> None:
    """Make sure that every tensor that this rank needs is stored."""
    try:
        for quantity, shards in held.items():
            for name, shard in shards.items():
                reader.require(quantity, name, shard.start, shard.stop)
    except CheckpointDamaged as error:
        raise StateUnusable(
            f"{error}, although none of its files is damaged: another release of cl_dist or another recipe wrote it; "
            "nothing was deleted"
        ) from error


def _quantities(shards: ShardView, moments: bool) -> dict[str, dict[str, Shard]]:
    """This rank's live master weights and, if `moments`, AdamW's moments, by quantity and parameter."""
    held: dict[str, dict[str, Shard]] = {MASTER: {}}
    for name in shards.names:
        master = shards.master(name)
        if master is not None:
            held[MASTER][name] = master
        for moment, shard in shards.moments(name).items() if moments else ():
            held.setdefault(moment, {})[name] = shard
    return held
