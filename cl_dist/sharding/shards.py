"""The public view of a DeepSpeed engine's training state on this rank (`cl_dist.shards`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from cl_dist.errors import BadInput, ClDistError
from cl_dist.sharding.check import check_deepspeed
from cl_dist.sharding.layouts import Shard
from cl_dist.sharding.view import ShardView


def shards(engine: Any) -> Shards:
    """This rank's pieces of gradients, float32 master weights and AdamW moments, under any ZeRO stage.

    Nothing is gathered or copied: the pieces are views of what DeepSpeed holds. `deepspeed.utils.safe_get_full_grad`
    and its relatives gather every parameter on every rank instead.

    Args:
        engine: A `deepspeed.DeepSpeedEngine` of stage 0 to 3, in float32 or bfloat16, with an AdamW optimiser. With
            transformers or accelerate it is `trainer.model_wrapped`, or what `accelerator.prepare` returns.

    Raises:
        BadInput: It is no such engine, or another release of DeepSpeed than the one that this release reads.
        ClDistError: The engine keeps its state where no view reaches (on NVMe, for example).
    """
    if not hasattr(engine, "_take_model_step") or getattr(engine, "optimizer", None) is None:
        raise BadInput(
            f"shards: {type(engine).__name__} is no DeepSpeed engine with an optimiser; give what deepspeed.initialize "
            "returns"
        )
    if problems := check_deepspeed():
        raise BadInput(f"shards: {problems[0]}")
    return Shards(engine)


class Shards:
    """Views of one engine's training state, by parameter name (see `shards`).

    A piece is a `Shard`: elements `[start, stop)` of the flattened parameter, with `data` of shape `(stop - start,)`.
    Gradient, master and moments of a parameter have the same `start`. The ranks' pieces cover every element once; under
    stage 0 every rank has everything. A rank may own nothing of a parameter, and then its piece is None.
    """

    def __init__(self, engine: Any) -> None:
        """`engine`: as for `shards`, which checks it."""
        self._engine, self._view = engine, ShardView(engine)

    @property
    def names(self) -> list[str]:
        """Trainable parameters, in model order."""
        return self._view.names

    def shape(self, name: str) -> torch.Size:
        """Shape of the whole parameter."""
        return self._view.shape(name)

    def gradient(self, name: str) -> Shard | None:
        """The reduced gradient. Read it after a step's last `engine.backward` and before `engine.step`; after that,
        stage 3 still shows the old one.

        It is not clipped yet. Writing to `data` changes it; then call `gradients_changed`.

        Raises ClDistError if this step's gradients are not reduced yet.
        """
        missing = (
            f"shards: the gradient of {name} is not there; it can be read after the last engine.backward of a step "
            "and before engine.step"
        )
        if not self._engine.is_gradient_accumulation_boundary():
            raise ClDistError(missing)
        self._view.layout.await_gradients()
        try:
            return self._view.own_gradient(name)
        except (ValueError, KeyError) as error:
            raise ClDistError(missing) from error

    def gradients_changed(self) -> None:
        """Call on every rank after writing to gradients, so that clipping uses their new norm (collective)."""
        self._view.own_gradients_changed()

    def master(self, name: str) -> Shard | None:
        """The float32 master weight. After writing to it, call `publish`."""
        return self._view.master(name)

    def moments(self, name: str) -> dict[str, Shard]:
        """AdamW's `exp_avg` and `exp_avg_sq`; empty before the first step. Writing to them changes the next step."""
        return self._view.moments(name)

    def publish(self) -> None:
        """Copy the masters into the weights that the model computes with, on all ranks (collective)."""
        self._view.publish()

    def sum_over_ranks(self, sums: torch.Tensor) -> torch.Tensor:
        """Turn sums over each rank's own elements into sums over all elements, in place (collective).

        `sums` lies where collectives run: on the GPU with NCCL.
        """
        return self._view.sum_over_ranks(sums)

    def before_update(self, function: Callable[[], None]) -> None:
        """Call `function` in every step, after the reduction and before clipping and update.

        For loops that hide the place between `engine.backward` and `engine.step`, such as those of transformers and
        accelerate.
        """
        self._view.on_boundary(function, lambda: None)
