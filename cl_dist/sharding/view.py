"""Rank-local views of the training state by parameter name, the same under every ZeRO stage.

Methods, checkpoints and the coordinator go through `ShardView`; they never ask which stage they run under.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from cl_dist.errors import ClDistError
from cl_dist.sharding.layouts import MOMENTS, FlatGroups, Layout, Partitioned, Replicated, WholeGradient
from cl_dist.sharding.shard import Shard


class ShardView:
    """The pieces of gradient, float32 master weight and AdamW moments that this rank holds, by parameter name.

    Args:
        engine: A `deepspeed.DeepSpeedEngine` of stage 0 to 3 with an AdamW optimiser.

    Raises:
        ClDistError: The engine keeps its state in a way that is not covered (NVMe offload, round-robin gradients, ...).
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.layout = _layout_of(engine)
        self.params = {name: param for name, param in engine.module.named_parameters() if param.requires_grad}
        self.edited: set[str] = set()
        """Parameters whose gradient was edited since it was reduced, in the step under way."""

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
        """Reduced gradient, a live view; only between the reduction and the optimiser step (`on_boundary`)."""
        return self.layout.gradient(self.params[name])

    def gradient_changed(self, name: str) -> None:
        """Call after editing a gradient, so that clipping uses its new norm."""
        self.edited.add(name)
        self.layout.gradient_changed(self.params[name])

    def own_gradient(self, name: str) -> Shard | None:
        """The part of `gradient` that lies along `master`, a live view; None too where the parameter got none."""
        master, gradient = self.master(name), self.gradient(name)
        if master is None or gradient is None:
            return None
        return Shard(master.start, gradient.data.narrow(0, master.start - gradient.start, master.data.numel()))

    def own_gradients_changed(self) -> None:
        """Call after every rank has edited its `own_gradient` of any parameters (collective)."""
        self.layout.complete_gradients(self.params.values())
        for name in self.names:
            self.gradient_changed(name)

    def sum_over_ranks(self, sums: torch.Tensor) -> torch.Tensor:
        """Sums over the elements that a rank owns made sums over all of them, in place (collective).

        Where every rank owns everything, they become those of rank 0, to the last bit. `sums` lie where collectives
        run.
        """
        if self.replicated:
            torch.distributed.broadcast(sums, src=0)
        else:
            torch.distributed.all_reduce(sums)
        return sums

    def master(self, name: str) -> Shard | None:
        """Float32 master weight, a live view; `publish` after editing it."""
        return self.layout.master(self.params[name])

    def moments(self, name: str) -> dict[str, Shard]:
        """AdamW's `exp_avg` and `exp_avg_sq`, live views; empty before the first step."""
        return self.layout.moments(self.params[name])

    def publish(self) -> None:
        """Make the model's weights follow the masters on all ranks (collective)."""
        self.layout.publish()

    def frozen(self, names: Iterable[str]) -> dict[str, Shard]:
        """This rank's share of parameters that are not trained, live views; missing where it has none of one.

        Together the ranks' shares are everything, once (under stage 0 every rank has it all). After editing them:
        `publish_frozen`.
        """
        shares = {name: self.layout.frozen(self._engine.module.get_parameter(name)) for name in names}
        return {name: share for name, share in shares.items() if share is not None}

    def publish_frozen(self, names: Iterable[str]) -> None:
        """Make the model's weights follow the ranks' shares of parameters that are not trained (collective)."""
        self.layout.publish_frozen([self._engine.module.get_parameter(name) for name in names])

    def gradient_norm(self) -> torch.Tensor:
        """Norm of all that this rank holds of the reduced gradient, a scalar where it lies; when `gradient` can be."""
        held = (self.gradient(name) for name in self.names)
        return torch.nn.utils.get_total_norm([shard.data for shard in held if shard is not None])

    def non_finite_gradient(self) -> str | None:
        """A parameter whose reduced gradient is NaN or infinite in an element that this rank holds."""
        for name in self.names:
            shard = self.gradient(name)
            if shard is not None and not shard.data.isfinite().all():
                return name
        return None

    def on_boundary(
        self,
        before: Callable[[], None],
        after: Callable[[], None],
        allowed: Callable[[], bool] = lambda: True,
        skipped: Callable[[], None] = lambda: None,
    ) -> None:
        """Call `before` once a step between reduction and norm, clipping and update, and `after` after the update.

        Where `allowed`, asked first and with the same answer on all ranks, says no, weights, moments and step count
        stay as they are to the last bit, the step's gradients are forgotten, and `skipped` is called in place of both.
        """
        take_step = self._engine._take_model_step

        def wrapped(*args: Any, **kwargs: Any) -> None:
            self.edited.clear()
            if not allowed():
                self._forget_gradients()
                with self.layout.optimizer_paused():
                    take_step(*args, **kwargs)
                return skipped()
            before()
            take_step(*args, **kwargs)
            return after()

        self._engine._take_model_step = wrapped

    def _forget_gradients(self) -> None:
        """Zero what would otherwise poison norms and overflow checks while DeepSpeed goes through its step."""
        for name in self.names:
            shard = self.gradient(name)
            if shard is not None:
                shard.data.zero_()
                self.gradient_changed(name)

    def reset_optimizer(self) -> None:
        """Forget both moments and the step count, in place: AdamW starts afresh."""
        for state in self._optimizer_states():
            for value in state.values():
                value.zero_()

    @property
    def optimizer_step(self) -> int:
        """AdamW's step count (its bias correction); 0 before the first step."""
        return int(max((float(state["step"]) for state in self._optimizer_states()), default=0))

    def allocate_moments(self, step: int) -> None:
        """Create the moments where AdamW has not yet done so (zeros) and set the step count: what a resume fills."""
        for flat in self.layout.flat_tensors():
            state = self.layout.inner.state[flat]
            for name in MOMENTS:
                state.setdefault(name, torch.zeros_like(flat.detach()))
            state["step"] = torch.tensor(float(step), device=flat.device)

    def set_learning_rate(self, learning_rate: float) -> None:
        """Set every group's learning rate for the next step."""
        for group in self.layout.inner.param_groups:
            group["lr"] = learning_rate

    def _optimizer_states(self) -> Iterator[dict[str, torch.Tensor]]:
        for flat in self.layout.flat_tensors():
            state = self.layout.inner.state.get(flat)
            if state:
                yield state


def _layout_of(engine: Any) -> Layout:
    """Choose the layout by DeepSpeed's optimiser class; refuse what is not covered."""
    optimizer = engine.optimizer
    kind = type(optimizer).__name__
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
