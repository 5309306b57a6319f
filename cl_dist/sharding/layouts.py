"""Where DeepSpeed keeps the pieces of the training state, one class per layout.

Facts about deepspeed 0.19.8 (private attributes; `check.py` names them, tests/sharding holds them against a dense oracle):

- stage 0: `param.grad`; in float32 the parameter is its own master, in bfloat16 `fp32_groups` holds the masters;
- stages 1 and 2: a rank owns one contiguous piece of each flattened parameter group; `param._hp_mapping` says which part of
  the parameter lies in it (None: nothing) and finds the reduced gradient; with offload the gradient lies in the flat
  partition's `.grad`, and clipping uses norms cached per parameter;
- stage 1, bfloat16 with float32 accumulation (`BF16_Optimizer`): the reduced gradient `param._hp_grad` is whole on every rank;
- stage 3: every parameter is cut into equal pieces, padded at the end; `grad_position` finds the piece in the flat sub-groups.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch

from cl_dist.sharding.shard import Shard

MOMENTS = ("exp_avg", "exp_avg_sq")


class Layout(ABC):
    """Rank-local views of one engine's gradients, float32 master weights and optimiser moments."""

    replicated = False
    """True where every rank holds everything (stage 0)."""

    def __init__(self, engine: Any, inner: torch.optim.Optimizer) -> None:
        self.engine = engine
        self.zero = engine.optimizer
        self.inner = inner

    @abstractmethod
    def gradient(self, param: torch.nn.Parameter) -> Shard | None:
        """View of the reduced gradient at the accumulation boundary; None where this rank holds nothing of it."""

    @abstractmethod
    def address(self, param: torch.nn.Parameter) -> tuple[torch.Tensor, int, int, int] | None:
        """Return (flat float32 tensor, offset in it, start in the parameter, elements); None where this rank owns nothing."""

    @abstractmethod
    def publish(self) -> None:
        """Make the weights that the model computes with follow the masters, on all ranks (collective)."""

    def gradient_changed(self, param: torch.nn.Parameter) -> None:  # noqa: B027 - most layouts cache nothing
        """Tell DeepSpeed that the gradient was edited (it caches norms under offload)."""

    def master(self, param: torch.nn.Parameter) -> Shard | None:
        """View of the float32 master weight."""
        found = self.address(param)
        if found is None:
            return None
        flat, offset, start, numel = found
        return Shard(start, flat.detach().view(-1).narrow(0, offset, numel))

    def moments(self, param: torch.nn.Parameter) -> dict[str, Shard]:
        """Views of the optimiser's moments by name; empty before they exist or where this rank owns nothing."""
        found = self.address(param)
        if found is None:
            return {}
        flat, offset, start, numel = found
        state = self.inner.state.get(flat, {})
        return {name: Shard(start, state[name].view(-1).narrow(0, offset, numel)) for name in MOMENTS if name in state}

    @abstractmethod
    def flat_tensors(self) -> list[torch.Tensor]:
        """The tensors that the inner optimiser steps on."""


class Replicated(Layout):
    """Stage 0: every rank holds everything."""

    replicated = True

    def __init__(self, engine: Any, inner: torch.optim.Optimizer) -> None:
        super().__init__(engine, inner)
        self._masters: dict[torch.nn.Parameter, torch.Tensor] = {}
        if hasattr(self.zero, "fp32_groups"):
            for low, high in zip(self.zero.fp16_groups, self.zero.fp32_groups, strict=True):
                self._masters.update(zip(low, high, strict=True))

    def gradient(self, param: torch.nn.Parameter) -> Shard | None:
        return None if param.grad is None else Shard(0, param.grad.view(-1))

    def address(self, param: torch.nn.Parameter) -> tuple[torch.Tensor, int, int, int] | None:
        return self._masters.get(param, param), 0, 0, param.numel()

    def publish(self) -> None:
        for low, high in self._masters.items():
            low.data.copy_(high.data)

    def flat_tensors(self) -> list[torch.Tensor]:
        return [param for group in self.inner.param_groups for param in group["params"]]


class FlatGroups(Layout):
    """Stages 1 and 2: each rank owns one piece of every flattened parameter group."""

    def gradient(self, param: torch.nn.Parameter) -> Shard | None:
        mapping = param._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            return None
        fragment = mapping.get_lp_grad_fragment(param._index_in_param_group)  # type: ignore[attr-defined]
        return Shard(mapping.lp_fragment_address.start, fragment.view(-1))

    def gradient_changed(self, param: torch.nn.Parameter) -> None:
        shard = self.gradient(param) if self.zero.cpu_offload else None
        if shard is not None:
            self.zero.norm_for_param_grads[self.zero.get_param_id(param)] = shard.data.double().norm(2)

    def address(self, param: torch.nn.Parameter) -> tuple[torch.Tensor, int, int, int] | None:
        mapping = param._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            return None
        flat = self.flat_tensors()[mapping.param_group_index]
        return flat, mapping.hp_fragment_address.start, mapping.lp_fragment_address.start, mapping.hp_fragment_address.numel

    def publish(self) -> None:
        self.zero.update_lp_params()

    def flat_tensors(self) -> list[torch.Tensor]:
        return list(self.zero.single_partition_of_fp32_groups)


class WholeGradient(FlatGroups):
    """Stage 1 in bfloat16 with float32 accumulation: masters as in `FlatGroups`, the gradient whole on every rank."""

    def gradient(self, param: torch.nn.Parameter) -> Shard | None:
        gradient = getattr(param, "_hp_grad", None)
        return None if gradient is None else Shard(0, gradient.view(-1))

    def gradient_changed(self, param: torch.nn.Parameter) -> None:
        return

    def flat_tensors(self) -> list[torch.Tensor]:
        return list(self.zero.fp32_groups_flat_partition)


class Partitioned(Layout):
    """Stage 3: every parameter is cut into one piece per rank."""

    def gradient(self, param: torch.nn.Parameter) -> Shard | None:
        flat, _ = self.zero._get_fp32_grad_state_partition(param=param, release_swap_buffers=True)
        start, numel = self._owned(param)
        return Shard(start, flat.view(-1).narrow(0, 0, numel)) if numel else None

    def gradient_changed(self, param: torch.nn.Parameter) -> None:
        if self.zero.offload_optimizer:
            shard = self.gradient(param)
            norm = torch.zeros(()) if shard is None else shard.data.double().norm(2)
            self.zero.norm_for_param_grads[self.zero.get_param_id(param)] = norm

    def address(self, param: torch.nn.Parameter) -> tuple[torch.Tensor, int, int, int] | None:
        group, offset, _ = self.zero.grad_position[self.zero.get_param_id(param)]
        start, numel = self._owned(param)
        return (self.flat_tensors()[group], offset, start, numel) if numel else None

    def publish(self) -> None:
        for group in range(len(self.flat_tensors())):
            self.zero._reassign_or_swap_out_partitioned_parameters(group)
        if self.zero.persistent_parameters:
            self.zero.persistent_parameters[0].all_gather(self.zero.persistent_parameters)

    def flat_tensors(self) -> list[torch.Tensor]:
        return list(self.zero.fp32_partitioned_groups_flat)

    def _owned(self, param: torch.nn.Parameter) -> tuple[int, int]:
        """(start, elements) of this rank's piece without the padding at the parameter's end."""
        piece = param.partition_numel()  # type: ignore[attr-defined]
        start = piece * self.zero._get_param_partition_rank(param)
        return start, max(0, min(piece, param.ds_numel - start))  # type: ignore[attr-defined]
