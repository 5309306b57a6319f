"""Rank-local views of the training state by parameter name, the same under every ZeRO stage.

Methods, checkpoints and the coordinator go through `ShardView`; they never ask which stage they run under.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from cl_dist.errors import ClDistError
from cl_dist.sharding.layouts import (
    MOMENTS,
    FlatGroups,
    Layout,
    Partitioned,
    Replicated,
    RowShards,
    Shard,
    WholeGradient,
)


@dataclass(frozen=True)
class TorchState:
    """A model and its optimiser without DeepSpeed: the parameters are the masters.

    Under FSDP2 (`fully_shard`) a rank holds its rows; else everything, and with several ranks something else (DDP)
    makes their gradients equal. `ShardView.on_boundary` is for DeepSpeed only.
    """

    module: torch.nn.Module
    """The model itself, not what wraps it; its trained parameters are float32."""
    optimizer: torch.optim.Optimizer
    """AdamW or Adam."""
    needs_every_gradient: bool = False
    """Whether whoever reduces gradients waits for that of every trained parameter, as DDP does on its own."""


class ShardView:
    """The pieces of gradient, float32 master weight and AdamW moments that this rank holds, by parameter name.

    Args:
        engine: A `deepspeed.DeepSpeedEngine` of stage 0 to 3 with an AdamW optimiser, or an `TorchState`.

    Raises:
        ClDistError: The engine keeps its state where no layout looks (NVMe offload, round-robin gradients, ...).
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.layout = _layout_of(engine)
        self.params = {name: param for name, param in engine.module.named_parameters() if param.requires_grad}
        self.edited: set[str] = set()
        """Parameters whose gradient was edited since it was reduced, in the current step."""
        self._on_publish: list[Callable[[], None]] = []
        self.unsent: dict[str, torch.Tensor] = {}
        """Zero, or NaN where this rank's gradient of the parameter was not finite before it was reduced. Only for those
        of which a part did not travel, so that the check for NaN sees that part too; empty otherwise."""
        self.state_bytes = 0
        """Bytes of gradient, float32 masters and moments that this rank holds at the end of a step; 0 before one."""

    @property
    def names(self) -> list[str]:
        """Trainable parameters, in model order."""
        return list(self.params)

    @property
    def replicated(self) -> bool:
        """Whether every rank holds everything (stage 0), so that one rank's copy is the whole state."""
        return self.layout.replicated

    def shape(self, name: str) -> torch.Size:
        """Shape of the whole parameter."""
        param = self.params[name]
        return getattr(param, "ds_shape", param.shape)

    def numel(self, name: str) -> int:
        """Elements of the whole parameter."""
        return self.shape(name).numel()

    def gradient(self, name: str) -> Shard | None:
        """Live view of the reduced gradient; valid only between reduction and optimiser step (`on_boundary`)."""
        return self.layout.gradient(self.params[name])

    @property
    def needs_every_gradient(self) -> bool:
        """Whether every backward pass has to compute a gradient of every trained parameter."""
        return isinstance(self._engine, TorchState) and self._engine.needs_every_gradient

    def fill_gradient(self, name: str) -> None:
        """Give a parameter that no backward pass of the step has reached a gradient of zeros.

        DeepSpeed does so itself. Without it, an optimiser of torch would leave out the parameter and its step count.
        """
        self.layout.fill_gradient(self.params[name])

    def gradient_changed(self, name: str) -> None:
        """Call after editing a gradient, so that clipping uses its new norm."""
        self.edited.add(name)
        self.layout.gradient_changed(self.params[name])

    def own_gradient(self, name: str) -> Shard | None:
        """Live view of the part of `gradient` aligned with `master`; None also where the parameter got no gradient."""
        master, gradient = self.master(name), self.gradient(name)
        if master is None or gradient is None:
            return None
        return Shard(master.start, gradient.data.narrow(0, master.start - gradient.start, master.data.numel()))

    def own_gradients_changed(self) -> None:
        """Call on every rank after editing `own_gradient` of any parameters (collective)."""
        self.layout.complete_gradients(self.params.values())
        for name in self.names:
            self.gradient_changed(name)

    def sum_over_ranks(self, sums: torch.Tensor) -> torch.Tensor:
        """Reduce sums over each rank's own elements to sums over all elements, in place (collective).

        Where every rank owns everything, all get rank 0's sums, so that they agree to the last bit. `sums` must be on
        the device that collectives run on.
        """
        if self.replicated:
            torch.distributed.broadcast(sums, src=0)
        else:
            torch.distributed.all_reduce(sums)
        return sums

    def master(self, name: str) -> Shard | None:
        """Live view of the float32 master weight; call `publish` after editing it."""
        return self.layout.master(self.params[name])

    def moments(self, name: str) -> dict[str, Shard]:
        """Live views of AdamW's `exp_avg` and `exp_avg_sq`; empty before the first step."""
        return self.layout.moments(self.params[name])

    def publish(self) -> None:
        """Copy the masters into the model's weights on all ranks (collective)."""
        self.layout.publish()
        for call in self._on_publish:
            call()

    def on_publish(self, call: Callable[[], None]) -> None:
        """Call `call` after every `publish`: layers may compute with copies of the weights."""
        self._on_publish.append(call)

    def frozen(self, names: Iterable[str]) -> dict[str, Shard]:
        """Live views of this rank's shares of parameters that are not trained; a parameter without a share is left out.

        Together the ranks' shares cover every element once (under stage 0 every rank has it all). Call `publish_frozen`
        after editing them.
        """
        shares = {name: self.layout.frozen(self._engine.module.get_parameter(name)) for name in names}
        return {name: share for name, share in shares.items() if share is not None}

    def publish_frozen(self, names: Iterable[str]) -> None:
        """Copy the ranks' shares of parameters that are not trained into the model's weights (collective)."""
        self.layout.publish_frozen([self._engine.module.get_parameter(name) for name in names])

    def gradient_norm(self) -> torch.Tensor:
        """Norm of what this rank holds of the reduced gradient: a scalar on its device. Valid while `gradient` is."""
        held = [shard.data for name in self.names if (shard := self.gradient(name)) is not None]
        return torch.nn.utils.get_total_norm([*held, *self.unsent.values()])

    def non_finite_gradient(self) -> str | None:
        """Name of a parameter whose reduced gradient is NaN or infinite in an element that this rank holds."""
        for name in self.names:
            shard = self.gradient(name)
            parts = [self.unsent.get(name), None if shard is None else shard.data]
            if not all(part.isfinite().all() for part in parts if part is not None):
                return name
        return None

    def on_boundary(
        self,
        before: Callable[[], None],
        after: Callable[[], None],
        allowed: Callable[[], bool] = lambda: True,
        skipped: Callable[[], None] = lambda: None,
    ) -> Callable[[], None]:
        """Call `before` once per step, after reduction and before clipping and update, and `after` after the update.

        `allowed` comes first and must answer the same on all ranks. If it says no, weights, moments and step count keep
        every bit, the step's gradients are dropped, and `skipped` runs instead of the two.

        Returns:
            A function that makes the engine step as before.
        """
        take_step = self._engine._take_model_step

        def wrapped(*args: Any, **kwargs: Any) -> None:
            self.edited.clear()
            self.layout.await_gradients()
            self.state_bytes = self.state_bytes or self._bytes_held()
            if not allowed():
                # DeepSpeed still goes through its step, which keeps its own counters right.
                self._zero_gradients()
                with self.layout.optimizer_paused():
                    take_step(*args, **kwargs)
                return skipped()
            before()
            take_step(*args, **kwargs)
            return after()

        def undo() -> None:
            self._engine._take_model_step = take_step

        self._engine._take_model_step = wrapped
        return undo

    def _bytes_held(self) -> int:
        held = [
            shard
            for name in self.names
            for shard in (self.gradient(name), self.master(name), *self.moments(name).values())
            if shard is not None
        ]
        return sum(shard.data.nbytes for shard in held)

    def _zero_gradients(self) -> None:
        """Zero what would otherwise poison the norms and overflow checks of DeepSpeed's step."""
        for name in self.names:
            shard = self.gradient(name)
            if shard is not None:
                shard.data.zero_()
                self.gradient_changed(name)

    def reset_optimizer(self) -> None:
        """Zero both moments and the step count in place, so that AdamW starts afresh."""
        for state in self._optimizer_states():
            for name, value in state.items():
                if isinstance(value, torch.Tensor):
                    value.zero_()
                else:  # DeepSpeed's own optimisers count steps in a plain number
                    state[name] = 0

    @property
    def optimizer_step(self) -> int:
        """AdamW's step count (its bias correction); 0 before the first step."""
        return int(max((float(state["step"]) for state in self._optimizer_states()), default=0))

    def allocate_moments(self, step: int) -> None:
        """Create zero moments where AdamW has none yet, and set the step count.

        AdamW itself creates them in its first step, which is too late for a resume that fills them.
        """
        for flat in self.layout.flat_tensors():
            state = self.layout.inner.state[flat]
            for name in MOMENTS:
                state.setdefault(name, torch.zeros_like(flat.detach()))
            state["step"] = torch.tensor(float(step), device=flat.device)

    def set_learning_rate(self, learning_rate: float) -> None:
        """Set the learning rate of every parameter group."""
        for group in self.layout.inner.param_groups:
            group["lr"] = learning_rate

    def _optimizer_states(self) -> Iterator[dict[str, Any]]:
        for flat in self.layout.flat_tensors():
            state = self.layout.inner.state.get(flat)
            if state:
                yield state


def is_fully_sharded(module: torch.nn.Module) -> bool:
    """Whether FSDP2's `fully_shard` has cut the module's parameters."""
    return any(isinstance(param, DTensor) for param in module.parameters())


def _layout_of(engine: Any) -> Layout:
    """Choose the layout by DeepSpeed's optimiser class; refuse a class without one."""
    optimizer = engine.optimizer
    kind = type(optimizer).__name__
    if isinstance(engine, TorchState) and is_fully_sharded(engine.module):
        return RowShards(engine, optimizer)
    if isinstance(optimizer, torch.optim.Optimizer):
        return Replicated(engine, optimizer)
    if kind == "FP16_UnfusedOptimizer":
        return Replicated(engine, optimizer.optimizer)
    if kind == "DeepSpeedZeroOptimizer":
        if optimizer.round_robin_gradients:
            raise ClDistError("zero.deepspeed: round_robin_gradients is not supported (its shards are mapped wrongly)")
        return FlatGroups(engine, optimizer.optimizer)
    if kind == "BF16_Optimizer":
        return WholeGradient(engine, optimizer.optimizer)
    if kind == "DeepSpeedZeroOptimizer_Stage3":
        if optimizer.swap_optimizer:
            raise ClDistError("zero.deepspeed: optimiser state on NVMe is not supported; offload to the CPU instead")
        return Partitioned(engine, optimizer.optimizer)
    raise ClDistError(f"DeepSpeed's {kind} is not supported; use ZeRO stage 0 to 3 in float32 or bfloat16")
