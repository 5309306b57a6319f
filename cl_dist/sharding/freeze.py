"""Keep chosen rows bit for bit through an optimiser step: weights and both moments.

A zero gradient does not stop AdamW: momentum and decoupled weight decay still move a row. The rows are therefore saved
before the inner optimiser steps and put back right after, before DeepSpeed copies the masters into the model's weights.
ZeRO steps its inner optimiser once per parameter group (or sub-group), so the hooks touch only what is being stepped.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from cl_dist.kernels import RowLayout
from cl_dist.sharding.shard import Shard
from cl_dist.sharding.view import ShardView


class RowFreezer:
    """Freezes, in every optimiser step, the rows named by `freeze` for that step.

    Args:
        shards: The engine's shards.
        layouts: By parameter name, how its rows lie; without one they are the rows of its first dimension.
    """

    def __init__(self, shards: ShardView, layouts: Mapping[str, RowLayout] | None = None) -> None:
        self._shards, self._layouts = shards, layouts or {}
        self._keep: Mapping[str, torch.Tensor] = {}
        self._saved: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        inner = shards.layout.inner
        self._handles = [inner.register_step_pre_hook(self._save), inner.register_step_post_hook(self._restore)]

    def freeze(self, keep: Mapping[str, torch.Tensor]) -> None:
        """Set, by parameter name, the `(rows,)` bool masks of rows that may move (of all
        experts one after the other); an empty mapping freezes nothing.
        """
        self._keep = keep

    def remove(self) -> None:
        """Take the hooks out again."""
        for handle in self._handles:
            handle.remove()

    def _save(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        stepped = {id(param) for group in optimizer.param_groups for param in group["params"]}
        for name, keep in self._keep.items():
            at = self._shards.layout.address(self._shards.params[name])
            if at is not None and id(at.flat) in stepped:
                self._save_parameter(name, keep)

    def _save_parameter(self, name: str, keep: torch.Tensor) -> None:
        master = self._shards.master(name)
        assert master is not None  # the caller saw its address
        for rows, dropped in self._dropped_rows(name, master, keep):
            self._saved.append((rows, dropped, rows[dropped].clone()))
        moments = self._shards.moments(name)
        for moment in moments.values():
            for rows, dropped in self._dropped_rows(name, moment, keep):
                self._saved.append((rows, dropped, rows[dropped].clone()))

    def _dropped_rows(self, name: str, shard: Shard, keep: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        shape = self._shards.shape(name)
        layout = self._layouts.get(name, RowLayout(1, shape[0], shape.numel() // shape[0]))
        keep = keep.to(shard.data.device)  # masters may be offloaded
        segments = layout.segments(shard.start, shard.data.numel())
        return [(segment.view(shard.data), ~keep.narrow(0, segment.row, segment.rows)) for segment in segments]

    def _restore(self, *_: Any) -> None:
        for rows, dropped, before in self._saved:
            rows[dropped] = before
        self._saved.clear()
