"""Which weights stage 3 gathers when, on a model without numbers: DeepSpeed's own schedule, driven by the real modules.

DeepSpeed gathers a module's parameters before its forward and backward, gathers ahead (`stage3_prefetch_bucket_size`),
and keeps what will be used again soon (`stage3_max_reuse_distance`), so that most weights of a small model are gathered
once per step, those of a large one twice, and three times with activation checkpointing. Here its
`PartitionedParameterCoordinator` and the module hooks of `DeepSpeedZeRoOffload` (0.19.8) run on a meta model, with
parameters whose gathers only count bytes.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from cl_dist.sharding.maps import padded_piece
from cl_dist.sharding.model import remove_leftovers

DEFAULTS = {
    "stage3_prefetch_bucket_size": 5 * 10**7,
    "stage3_max_reuse_distance": 10**9,
    "stage3_max_live_parameters": 10**9,
    "stage3_param_persistence_threshold": 10**5,
    "stage3_model_persistence_threshold": 2**63 - 1,
}
"""DeepSpeed's, in elements."""


@dataclass
class Gathers:
    """What one pass over the model gathers, in bytes."""

    fetched: int = 0
    """Outputs of the all-gathers in forward and backward."""
    calls: int = 0

    def clear(self) -> None:
        """Begin a new pass."""
        self.fetched = self.calls = 0


@dataclass
class _Handle:
    """A running gather. Like DeepSpeed's, it keeps its buffer until its last parameter has been waited for."""

    params: list[Any]
    arrive: Callable[[list[Any]], None]
    complete: bool = field(default=False)

    def __hash__(self) -> int:
        return id(self)

    def wait(self, handle_dependency: bool = True) -> None:
        """The gather has ended."""
        if not self.complete:
            self.complete = True
            self.arrive(self.params)


class GatherSchedule:
    """Stage 3's gathers for one model and number of ranks.

    Args:
        model: On the meta device. Hooks and marks stay on it only inside `installed`.
        world: Number of ranks, at least 2; a single rank gathers nothing.
        settings: DeepSpeed's `zero_optimization` settings.
        hold: Called with a number of bytes whenever gathered weights take up memory, and with its negative when they
            are released.
    """

    def __init__(
        self, model: nn.Module, world: int, settings: Mapping[str, Any], hold: Callable[[int], None] = lambda _: None
    ) -> None:
        self._model, self._world, self._hold = model, world, hold
        self._settings = {**DEFAULTS, **settings}
        self.gathers = Gathers()
        self._persistent = persistent_parameters(model, settings)
        self._status: Any = None

    @property
    def persistent_bytes(self) -> int:
        """Bytes of the parameters that stay gathered between steps, on every rank."""
        return sum(self._bytes(param) for param in self._persistent)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Inside the block, forward and backward passes of the model gather."""
        if not torch.cuda.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed prints that it found none
        from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus, _init_external_params
        from deepspeed.runtime.zero.partitioned_param_coordinator import (
            InflightParamRegistry,
            PartitionedParameterCoordinator,
        )

        self._status = ZeroParamStatus
        for module in self._model.modules():
            _init_external_params(module)
        params = list(self._model.parameters())
        for number, param in enumerate(params):
            self._mark(number, param)
        offload = DeepSpeedZeRoOffload.__new__(DeepSpeedZeRoOffload)
        offload.module, offload.zenflow, offload.forward_hooks, offload.backward_hooks = self._model, False, [], []
        offload.param_coordinator = PartitionedParameterCoordinator(
            prefetch_bucket_sz=int(self._settings["stage3_prefetch_bucket_size"]),
            max_reuse_distance_in_numel=int(self._settings["stage3_max_reuse_distance"]),
            max_available_parameters_in_numel=int(self._settings["stage3_max_live_parameters"]),
            allgather_stream=None,
            inflight_param_registry=InflightParamRegistry(),
        )
        self._offload = offload
        try:
            with _without_ranks():
                offload.setup_zero_stage3_hooks()
                yield
                offload._remove_module_hooks()
        finally:
            remove_leftovers(self._model)
            for param in params:
                for name in [name for name in vars(param) if name.startswith("ds_") or name in _MARKS]:
                    delattr(param, name)

    def end_micro_batch(self) -> None:
        """The backward pass is over."""
        self._offload.release_backward_leftovers()

    def end_step(self) -> None:
        """The optimiser steps: everything is released, and what is persistent is gathered again."""
        self._offload.partition_all_parameters()
        for param in self._persistent:
            param.ds_status = self._status.AVAILABLE  # type: ignore[attr-defined]

    def _mark(self, number: int, param: Any) -> None:
        """Give a parameter what the coordinator asks of it."""
        piece = padded_piece(param.numel(), self._world)
        param.ds_id, param.ds_numel, param.ds_shape = number, param.numel(), param.shape
        param.ds_persist = any(param is each for each in self._persistent)
        param.ds_status = self._status.AVAILABLE if param.ds_persist else self._status.NOT_AVAILABLE
        param.ds_tensor = SimpleNamespace(ds_numel=piece, final_location=None)
        param.ds_secondary_tensor, param.ds_active_sub_modules = None, set()
        param.is_external_param, param.nvme_swapper = False, None
        param.partition_numel = lambda: piece
        param.ds_summary = lambda **_: f"parameter {number}"
        param.all_gather_coalesced = self._gather
        # DeepSpeed calls it when a module returns a parameter that another one will use.
        param.all_gather = lambda: self._gather([param]).wait()
        param.partition = lambda free_data=True: self._release(param)

    def _bytes(self, param: Any) -> int:
        return padded_piece(param.numel(), self._world) * self._world * param.element_size()

    def _gather(self, params: Iterable[Any], quantize: bool = False) -> _Handle:
        """Begin a gather. Several parameters arrive in one buffer, from which each is then copied."""
        some = list(params)
        size = sum(self._bytes(param) for param in some)
        self.gathers.fetched += size
        self.gathers.calls += 1
        for param in some:
            param.ds_status = self._status.INFLIGHT
        self._hold(size)
        handle = _Handle(some, self._arrive_alone if len(some) == 1 else self._arrive)
        if len(some) > 1:
            weakref.finalize(handle, self._hold, -size)
        return handle

    def _arrive_alone(self, params: list[Any]) -> None:
        params[0].ds_status = self._status.AVAILABLE
        if params[0].ds_persist:  # counts with the weights that are held throughout
            self._hold(-self._bytes(params[0]))

    def _arrive(self, params: list[Any]) -> None:
        for param in params:
            param.ds_status = self._status.AVAILABLE
            if not param.ds_persist:
                self._hold(self._bytes(param))

    def _release(self, param: Any) -> None:
        param.ds_status = self._status.NOT_AVAILABLE
        if not param.ds_persist:
            self._hold(-self._bytes(param))


_MARKS = ("is_external_param", "nvme_swapper", "partition_numel", "all_gather_coalesced", "all_gather", "partition")


@contextmanager
def _without_ranks() -> Iterator[None]:
    """Inside the block, DeepSpeed's schedule neither prints nor compares itself with other ranks: there are none."""
    from deepspeed.runtime.zero import parameter_offload, partitioned_param_coordinator

    names = ("print_rank_0", "assert_ints_same_as_other_ranks")
    places = [
        (module, name, getattr(module, name))
        for module in (parameter_offload, partitioned_param_coordinator)
        for name in names
        if hasattr(module, name)
    ]
    for module, name, _ in places:
        setattr(module, name, lambda *_, **__: None)
    try:
        yield
    finally:
        for module, name, original in places:
            setattr(module, name, original)


def persistent_parameters(model: nn.Module, settings: Mapping[str, Any]) -> list[nn.Parameter]:
    """The parameters that stage 3 keeps whole on every rank: small ones, until their sum reaches a limit
    (`DeepSpeedZeRoOffload.mark_persistent_parameters`).
    """
    values = {**DEFAULTS, **settings}
    kept: list[nn.Parameter] = []
    total = 0
    for param in model.parameters():
        fits = param.numel() + total <= values["stage3_model_persistence_threshold"]
        if fits and param.numel() <= values["stage3_param_persistence_threshold"]:
            kept.append(param)
            total += param.numel()
    return kept
