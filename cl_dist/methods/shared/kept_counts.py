"""In how many steps of a task each row was kept: a record for readers of the run, which training never uses."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from cl_dist.sharding import Shard
from cl_dist.state.atomic import make_folder, replacing

BYTES = 4
"""Of a row's count."""
QUANTITY = "kept_rows"
"""Name of the counts in a saved state."""


class KeptCounts:
    """Counts on the device, one for each row; the host reads them only when a task is over.

    All ranks choose the same rows, so each has the whole counts. In a saved state every rank has some layers: together
    they hold each layer once, and any number of ranks can read them again.

    Args:
        rows: Number of rows of each masked weight, by name, in the order of the masks.
        device: Where the masks are.
        replicated: Whether one rank writes the whole saved state (ZeRO stage 0).
    """

    def __init__(self, rows: Mapping[str, int], device: torch.device, replicated: bool) -> None:
        self._counts = torch.zeros(sum(rows.values()), dtype=torch.int32, device=device)
        self._by_weight = dict(zip(rows, self._counts.split(list(rows.values())), strict=True))
        self._replicated = replicated
        self._first: int | None = None
        """The first step (from 1) that the counts include; None: no step has begun since they were lost."""
        self._steps = 0

    def begin(self, step: int) -> None:
        """Optimiser step `step` (from 0) begins: a new record with a task's first step."""
        if step == 0:
            self._reset()
        if self._first is None:
            self._first = step + 1

    def add(self, keep: torch.Tensor) -> None:
        """Count the rows that a step has kept, `(rows,)` bool on the device."""
        self._counts.add_(keep)
        self._steps += 1

    def _reset(self) -> None:
        self._counts.zero_()
        self._first, self._steps = None, 0

    def tensors(self) -> dict[str, Shard]:
        """The layers that this rank saves, by weight."""
        rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        return {
            name: Shard(0, counts)
            for number, (name, counts) in enumerate(self._by_weight.items())
            if self._replicated or number % world == rank
        }

    def tensors_loaded(self) -> None:
        """Give every rank the layers that the others have read (collective)."""
        if self._replicated or torch.distributed.get_world_size() == 1:
            return
        own = self.tensors()
        for name, counts in self._by_weight.items():
            if name not in own:
                counts.zero_()
        torch.distributed.all_reduce(self._counts)

    def state(self) -> dict[str, Any]:
        """Which steps the counts include."""
        return {"first_step": self._first, "steps": self._steps}

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """Continue with the loaded counts; None: an older release saved none, so they begin with the next step."""
        if state is None:
            self._reset()
        else:
            self._first, self._steps = state["first_step"], state["steps"]

    def updated(self, elements: Mapping[str, int]) -> float | None:
        """The elements that a step has updated, on average: the kept rows' share of each masked weight, and all others.
        None: no step was counted.

        Args:
            elements: Number of elements of every trained parameter, by name.
        """
        if not self._steps:
            return None
        kept = {name: counts.sum().item() / (self._steps * len(counts)) for name, counts in self._by_weight.items()}
        return sum(kept.get(name, 1.0) * number for name, number in elements.items())

    def write(self, path: Path, masked: bool) -> None:
        """Replace the file `path`: a tensor for each masked weight, and what the counts include as metadata.

        Without masks there are no tensors. A task that an older release trained to its end has no record.

        Raises:
            DiskFull: The disk is full; an older file is intact.
        """
        if self._first is None:
            return
        about = {**self.state(), "masked": masked, "layers": list(self._by_weight)}
        meta = {"record": json.dumps(about)}  # a single key: safetensors writes several in any order
        counts = self._counts.cpu().split([len(each) for each in self._by_weight.values()]) if masked else ()
        make_folder(path.parent)
        with replacing(path) as temporary:
            save_file(
                {name: each.clone() for name, each in zip(self._by_weight, counts, strict=False)}, temporary, meta
            )
