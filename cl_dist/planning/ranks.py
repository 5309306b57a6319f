"""What one rank holds of a model's training state: sizes that memory and communication both follow from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from cl_dist.methods.cost import Cost, RankShare
from cl_dist.planning.setup import Setup
from cl_dist.planning.shape import ModelShape
from cl_dist.sharding.gathers import persistent_parameters
from cl_dist.sharding.maps import PARAMETER_ALIGNMENT_BYTES, SUB_GROUP_SIZE, ShardMap, padded_piece

FLOAT32 = 4


@dataclass(frozen=True)
class RankView:
    """One rank of a planned run.

    Args:
        setup: The run.
        shape: Its model.
        rank: The rank. The first one has no padding at the end of what it owns, so it has most.
    """

    setup: Setup
    shape: ModelShape
    rank: int = 0

    @cached_property
    def zero(self) -> dict[str, Any]:
        """DeepSpeed's settings of ZeRO."""
        settings: dict[str, Any] = self.setup.deepspeed["zero_optimization"]
        return settings

    @cached_property
    def map(self) -> ShardMap:
        """Who owns what."""
        aligned = self.zero.get("parameter_alignment", False)
        alignment = PARAMETER_ALIGNMENT_BYTES // math.gcd(PARAMETER_ALIGNMENT_BYTES, self.setup.itemsize)
        return ShardMap(
            groups=[{each.name: each.numel for each in group} for group in self.shape.groups],
            stage=self.setup.stage,
            ranks=self.setup.world,
            parameter_alignment=alignment if aligned else 1,
            sub_group_size=int(self.zero.get("sub_group_size", SUB_GROUP_SIZE)),
        )

    @cached_property
    def trained(self) -> int:
        """Elements of all trainable parameters."""
        return sum(each.numel for each in self.shape.trainable.values())

    @cached_property
    def owned(self) -> int:
        """Elements of the flat tensors that the inner optimiser steps on this rank, with padding."""
        return sum(self.map.flat_numels)

    @cached_property
    def touched(self) -> int:
        """Elements of all parameters, whole, that a rank owns a part of at stages 1 and 2; of the rank with most.

        DeepSpeed keeps their gradients whole until the step (`copy_grads_in_partition` in stage_1_and_2.py), so that
        with many ranks each of them holds the whole gradient of an embedding that it owns a sliver of.
        """
        totals = [0] * self.setup.world
        for group, piece in zip(self.map.flat_groups, self.map.flat_numels, strict=True):
            start = 0
            for name, size in group.items():
                numel = self.map.numels[name]
                for rank in range(start // piece, (start + numel - 1) // piece + 1):
                    totals[rank] += numel
                start += size
        return max(totals)

    @property
    def step_gradients(self) -> int:
        """Bytes on the device, allocated in every step, in which the reduced gradient waits for the optimiser."""
        setup = self.setup
        if setup.stage == 0:
            return self.trained * setup.itemsize
        if setup.stage == 3 or setup.recipe.zero.offload or setup.whole_float32_gradients:
            return 0  # it has permanent buffers
        if setup.gradient_itemsize != setup.itemsize:  # `_build_compact_grad_partition_buffer`
            return self.owned * setup.gradient_itemsize
        return self.touched * setup.itemsize

    @cached_property
    def persistent(self) -> int:
        """Elements that stage 3 keeps gathered, with padding; on a single rank nothing has to be gathered."""
        if self.setup.stage != 3 or self.setup.world == 1:
            return 0
        kept = persistent_parameters(self.shape.model, self.zero)
        return sum(padded_piece(each.numel(), self.setup.world) * self.setup.world for each in kept)

    @cached_property
    def methods(self) -> Cost:
        """What the recipe's methods add."""
        return self.shape.method.cost(self.share)

    @property
    def share(self) -> RankShare:
        """What the methods are told."""
        recipe, setup = self.setup.recipe, self.setup
        owned = {name: piece.numel for name, piece in self.map.owned(self.rank).items()}
        return RankShare(
            model=self.shape.model,
            train=recipe.train,
            shapes={name: each.shape for name, each in self.shape.trainable.items()},
            owned=owned,
            gradient_bytes=setup.gradient_itemsize,
            itemsize=setup.itemsize,
            world=setup.world,
            stage=setup.stage,
            masters_on_host=recipe.zero.offload,
            tasks=len(recipe.stream.tasks),
            tokens=recipe.train.micro_batch_size * setup.tokens,
            gpu=setup.device == "cuda",
        )
