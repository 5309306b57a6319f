"""Where DeepSpeed keeps the pieces of the training state, one class per layout.

Facts about deepspeed 0.19.8 (private attributes; `check.py` names them, tests/distributed compares them with a dense
oracle):

- stage 0: gradients are in `param.grad`; in float32 the parameter is its own master, in bfloat16 the masters are in
  `fp32_groups`;
- stages 1 and 2: a rank owns one contiguous piece of each flattened parameter group; `param._hp_mapping` says which
  part of the parameter lies in it (None: nothing) and finds the reduced gradient. With offload the gradient is in the
  flat partition's `.grad`, and clipping uses norms cached per parameter;
- stage 1 in bfloat16 with float32 accumulation (`BF16_Optimizer`): every rank holds the whole reduced gradient,
  `param._hp_grad`;
- stage 3: every parameter is cut into equal pieces and padded at the end; `grad_position` finds a piece in the flat
  sub-groups;
- FSDP2, without DeepSpeed (torch 2.13): a parameter is a DTensor cut between rows, and so are its gradient and moments;
  `_local_tensor` is what the rank holds.

`maps.py` computes the same pieces without an engine.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from typing_extensions import override

from cl_dist.sharding.maps import even_share, owned_piece

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Shard:
    """What one rank holds of a flattened parameter (or of its gradient or a moment): elements `[start, stop)`."""

    start: int
    data: torch.Tensor
    """`(numel,)`: a view of the live tensor, so that writing to it changes the training state."""

    @property
    def stop(self) -> int:
        """One past the last element."""
        return self.start + self.data.numel()


class Address(NamedTuple):
    """Where this rank's piece of a parameter lies in the flat tensors that the inner optimiser steps."""

    flat: torch.Tensor
    """Float32 tensor that holds the piece."""
    offset: int
    """First element of the piece in `flat`."""
    start: int
    """First element of the piece in the flattened parameter."""
    numel: int
    """Elements of the piece."""

    def piece_of(self, like_flat: torch.Tensor) -> Shard:
        """View the piece of any tensor laid out like `flat`: the masters themselves, a gradient or a moment."""
        return Shard(self.start, local_part(like_flat).view(-1).narrow(0, self.offset, self.numel))


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
        """View the reduced gradient at the accumulation boundary; None where this rank holds none of it."""

    @abstractmethod
    def address(self, param: torch.nn.Parameter) -> Address | None:
        """Locate the master weight; None where this rank owns none of it."""

    @abstractmethod
    def publish(self) -> None:
        """Copy the masters into the weights that the model computes with, on all ranks (collective)."""

    def fill_gradient(self, param: torch.nn.Parameter) -> None:  # noqa: B027 - DeepSpeed has filled most
        """Give a parameter that no backward pass has reached a gradient of zeros, as DeepSpeed does."""

    def await_gradients(self) -> None:  # noqa: B027 - most gradients are on the device that computes them
        """Wait until the reduced gradients are where `gradient` looks. Call before reading any, in every step."""

    def gradient_changed(self, param: torch.nn.Parameter) -> None:  # noqa: B027 - most layouts cache nothing
        """Refresh what DeepSpeed has cached about an edited gradient (norms, under offload)."""

    def complete_gradients(self, params: Iterable[torch.nn.Parameter]) -> None:  # noqa: B027 - most hold no more
        """Fetch the parts of each gradient that a rank holds but does not own from their owners (collective)."""

    def master(self, param: torch.nn.Parameter) -> Shard | None:
        """View the float32 master weight."""
        at = self.address(param)
        return None if at is None else at.piece_of(at.flat.detach())

    def moments(self, param: torch.nn.Parameter) -> dict[str, Shard]:
        """View the optimiser's moments by name; empty before they exist or where this rank owns nothing."""
        at = self.address(param)
        if at is None:
            return {}
        state = self.inner.state.get(at.flat, {})
        return {name: at.piece_of(state[name]) for name in MOMENTS if name in state}

    @abstractmethod
    def frozen(self, param: torch.nn.Parameter) -> Shard | None:
        """View this rank's share of a parameter that is not trained, None where it has none; after an edit call
        `publish_frozen`.
        """

    @abstractmethod
    def publish_frozen(self, params: Sequence[torch.nn.Parameter]) -> None:
        """Make the model compute with all ranks' shares of parameters that are not trained (collective)."""

    @abstractmethod
    def flat_tensors(self) -> list[torch.Tensor]:
        """List the tensors that the inner optimiser steps."""

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """The inner optimiser, and stage 3's second one for the share that an offload ratio keeps on the GPU."""
        backup = getattr(self.zero, "backup_optimizer", None)
        return [self.inner] if backup is None else [self.inner, backup]

    @contextmanager
    def optimizer_paused(self) -> Iterator[None]:
        """Let DeepSpeed run its step, with all its bookkeeping, while the inner optimiser does nothing.

        Its hooks do not run either: they belong to `Optimizer.step`, which is shadowed meanwhile. A learning rate
        scheduler of torch has shadowed it before, to notice steps.
        """
        before = [(optimizer, optimizer.__dict__.get("step")) for optimizer in self.optimizers]
        for optimizer, _ in before:
            optimizer.step = lambda *_, **__: None  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            for optimizer, step in before:
                if step is None:
                    del optimizer.__dict__["step"]
                else:
                    optimizer.step = step  # type: ignore[method-assign]


class Replicated(Layout):
    """Stage 0: every rank holds everything."""

    replicated = True

    def __init__(self, engine: Any, inner: torch.optim.Optimizer) -> None:
        super().__init__(engine, inner)
        # In bfloat16 the optimiser keeps a float32 master beside each parameter. In float32 there are none to map.
        self._masters: dict[torch.nn.Parameter, torch.Tensor] = {}
        if hasattr(self.zero, "fp32_groups"):
            for low, high in zip(self.zero.fp16_groups, self.zero.fp32_groups, strict=True):
                self._masters.update(zip(low, high, strict=True))

    @override
    def gradient(self, param: torch.nn.Parameter) -> Shard | None:
        return None if param.grad is None else Shard(0, param.grad.view(-1))

    @override
    def fill_gradient(self, param: torch.nn.Parameter) -> None:
        if param.grad is None:
            param.grad = torch.zeros_like(param)

    @override
    def address(self, param: torch.nn.Parameter) -> Address | None:
        return Address(self._masters.get(param, param), 0, 0, param.numel())

    @override
    def publish(self) -> None:
        for low, high in self._masters.items():
            low.data.copy_(high.data)

    @override
    def frozen(self, param: torch.nn.Parameter) -> Shard | None:
        return Shard(0, param.detach().view(-1))

    @override
    def publish_frozen(self, params: Sequence[torch.nn.Parameter]) -> None:
        return  # every rank's share is the whole

    @override
    def flat_tensors(self) -> list[torch.Tensor]:
        return [param for group in self.inner.param_groups for param in group["params"]]


class RowShards(Layout):
    """PyTorch's FSDP2 (`fully_shard`): every parameter is a DTensor, cut between rows of its first dimension.

    What a rank holds is its own master; every forward pass gathers the weights from these.
    """

    @override
    def gradient(self, param: torch.nn.Parameter) -> Shard | None:
        start, numel = _rows_owned(param)
        return Shard(start, local_part(param.grad).view(-1)) if numel and param.grad is not None else None

    @override
    def fill_gradient(self, param: torch.nn.Parameter) -> None:
        if param.grad is None:
            param.grad = torch.zeros_like(param)

    @override
    def address(self, param: torch.nn.Parameter) -> Address | None:
        start, numel = _rows_owned(param)
        return Address(param, 0, start, numel) if numel else None

    @override
    def publish(self) -> None:
        reshard(self.engine.module)

    @override
    def frozen(self, param: torch.nn.Parameter) -> Shard | None:
        start, numel = _rows_owned(param)
        return Shard(start, local_part(param.detach()).view(-1)) if numel else None

    @override
    def publish_frozen(self, params: Sequence[torch.nn.Parameter]) -> None:
        self.publish()

    @override
    def flat_tensors(self) -> list[torch.Tensor]:
        return [param for group in self.inner.param_groups for param in group["params"]]


class FlatGroups(Layout):
    """Stages 1 and 2: each rank owns one piece of every flattened parameter group."""

    @override
    def gradient(self, param: torch.nn.Parameter) -> Shard | None:
        mapping = param._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            return None
        fragment = mapping.get_lp_grad_fragment(param._index_in_param_group)  # type: ignore[attr-defined]
        return Shard(mapping.lp_fragment_address.start, fragment.view(-1))

    @override
    def await_gradients(self) -> None:
        # Under offload the GPU is still copying them into pinned memory. DeepSpeed itself waits in its step only.
        # (Under stage 3 it waits in the function that `Partitioned.gradient` calls.)
        if self.zero.cpu_offload:
            self.zero._wait_for_offload_copies()

    @override
    def gradient_changed(self, param: torch.nn.Parameter) -> None:
        # Under offload DeepSpeed clips by norms that it cached when the gradients arrived.
        shard = self.gradient(param) if self.zero.cpu_offload else None
        if shard is not None:
            self.zero.norm_for_param_grads[self.zero.get_param_id(param)] = shard.data.double().norm(2)

    @override
    def address(self, param: torch.nn.Parameter) -> Address | None:
        mapping = param._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            return None
        flat = self.flat_tensors()[mapping.param_group_index]
        master = mapping.hp_fragment_address
        return Address(flat, master.start, mapping.lp_fragment_address.start, master.numel)

    @override
    def publish(self) -> None:
        self.zero.update_lp_params()

    @override
    def frozen(self, param: torch.nn.Parameter) -> Shard | None:
        # Every rank holds all of it. An even share each means that exactly one rank saves each element.
        shard = _piece(param, torch.distributed.get_rank())
        return shard if shard.data.numel() else None

    @override
    def publish_frozen(self, params: Sequence[torch.nn.Parameter]) -> None:
        # One broadcast per rank carries its shares of all parameters, flattened into one tensor.
        for rank in range(torch.distributed.get_world_size() if params else 0):
            pieces = [_piece(param, rank).data for param in params]
            flat = torch.cat(pieces)
            torch.distributed.broadcast(flat, src=rank)
            for piece, whole in zip(pieces, flat.split([piece.numel() for piece in pieces]), strict=True):
                piece.copy_(whole)

    @override
    def flat_tensors(self) -> list[torch.Tensor]:
        return list(self.zero.single_partition_of_fp32_groups)


class WholeGradient(FlatGroups):
    """Stage 1 in bfloat16 with float32 accumulation: masters as in `FlatGroups`, whole gradients on every rank."""

    @override
    def gradient(self, param: torch.nn.Parameter) -> Shard | None:
        gradient = getattr(param, "_hp_grad", None)
        return None if gradient is None else Shard(0, gradient.view(-1))

    @override
    def await_gradients(self) -> None:
        return

    @override
    def gradient_changed(self, param: torch.nn.Parameter) -> None:
        return

    @override
    def complete_gradients(self, params: Iterable[torch.nn.Parameter]) -> None:
        # Every rank clips by the norm of the gradient that it holds, so all must hold the same one. Each contributes
        # the piece it owns, zeros elsewhere, and the sum is whole again.
        for param in params:
            gradient, at = self.gradient(param), self.address(param)
            if gradient is None:
                continue
            own = torch.zeros_like(gradient.data)
            if at is not None:
                own.narrow(0, at.start, at.numel).copy_(gradient.data.narrow(0, at.start, at.numel))
            torch.distributed.all_reduce(own)
            gradient.data.copy_(own)

    @override
    def flat_tensors(self) -> list[torch.Tensor]:
        return list(self.zero.fp32_groups_flat_partition)


class Partitioned(Layout):
    """Stage 3: every parameter is cut into one piece per rank."""

    @override
    def gradient(self, param: torch.nn.Parameter) -> Shard | None:
        flat, _ = self.zero._get_fp32_grad_state_partition(param=param, release_swap_buffers=True)
        start, numel = self._owned(param)
        return Shard(start, flat.view(-1).narrow(0, 0, numel)) if numel else None

    @override
    def gradient_changed(self, param: torch.nn.Parameter) -> None:
        # As under stage 2; here a rank without a piece also has an entry, of norm zero.
        if self.zero.offload_optimizer:
            shard = self.gradient(param)
            norm = torch.zeros(()) if shard is None else shard.data.double().norm(2)
            self.zero.norm_for_param_grads[self.zero.get_param_id(param)] = norm

    @override
    def address(self, param: torch.nn.Parameter) -> Address | None:
        group, offset, _ = self.zero.grad_position[self.zero.get_param_id(param)]
        start, numel = self._owned(param)
        return Address(self.flat_tensors()[group], offset, start, numel) if numel else None

    @override
    def publish(self) -> None:
        # As DeepSpeed's own step does. Small parameters stay gathered between steps, with their old values: partition
        # them first, or the new values would never be gathered.
        self.zero._partition_all_parameters()
        for group in range(len(self.flat_tensors())):
            self.zero._reassign_or_swap_out_partitioned_parameters(group)
        self._gather_persistent()

    def _gather_persistent(self) -> None:
        if self.zero.persistent_parameters:
            self.zero.persistent_parameters[0].all_gather(self.zero.persistent_parameters)

    @override
    def frozen(self, param: torch.nn.Parameter) -> Shard | None:
        start, numel = self._owned(param)
        return Shard(start, param.ds_tensor.detach().view(-1).narrow(0, 0, numel)) if numel else None  # type: ignore[attr-defined]

    @override
    def publish_frozen(self, params: Sequence[torch.nn.Parameter]) -> None:
        self.zero._partition_all_parameters()  # small ones stay gathered, with their old values
        self._gather_persistent()

    @override
    def flat_tensors(self) -> list[torch.Tensor]:
        return list(self.zero.fp32_partitioned_groups_flat)

    def _owned(self, param: torch.nn.Parameter) -> tuple[int, int]:
        """(start, elements) of this rank's piece, without the padding at the parameter's end."""
        rank = self.zero._get_param_partition_rank(param)
        return owned_piece(param.ds_numel, param.partition_numel(), rank)  # type: ignore[attr-defined]


def reshard(module: torch.nn.Module) -> None:
    """Under FSDP2, release the weights that a pass without backward has left gathered, with their old values."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a DTensor, live; any other tensor is returned as it is."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def _rows_owned(param: torch.Tensor) -> tuple[int, int]:
    """(start, elements) of this rank's rows of a DTensor: torch gives every rank but the last ones as many."""
    assert isinstance(param, DTensor)
    rows, ranks, rank = param.shape[0], param.device_mesh.size(), param.device_mesh.get_local_rank()
    start = min(rank * -(-rows // ranks), rows)
    return start * (param.numel() // rows), param._local_tensor.numel()


def _piece(param: torch.nn.Parameter, rank: int) -> Shard:
    """View a rank's even share, possibly empty, of a parameter that every rank holds whole."""
    start, stop = even_share(param.numel(), rank, torch.distributed.get_world_size())
    return Shard(start, param.detach().view(-1).narrow(0, start, stop - start))
