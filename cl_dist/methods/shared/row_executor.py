"""Carries out a choice of rows: whatever is not kept gets no gradient, or does not change at all.

A method says which rows a step updates; `RowExecutor` does the most that the moment of the choice allows:

- before a forward pass, for whole modules (`rest`): backward computes nothing at all for their parameters;
- before a backward pass (`choose`): backward does not compute the other rows of the weights' gradients;
- once the gradients are reduced (`apply`): the other rows are zeroed in this rank's shards, where backward has not
  skipped them already, and with `dropped="update"` frozen together with their moments while the optimiser steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import nn

from cl_dist.kernels import RowLayout, mask_rows_
from cl_dist.methods.cost import ADAMW_BYTES, Cost
from cl_dist.models.layer_kinds import Tap, TrackedLayer
from cl_dist.models.resting import Rest
from cl_dist.models.skipping import RowSkipper
from cl_dist.models.tracked import shares_weight
from cl_dist.sharding import CompactExchange, RowFreezer, ShardView

Keep = Mapping[str, torch.Tensor]
"""By parameter name `(rows,)` bool, True for rows that are updated; the rows of several matrices (experts) lie one
after the other. A parameter that is left out is updated as a whole."""
Rows = Mapping[str, Sequence[torch.Tensor]]
"""By layer name, for each of its matrices, the numbers of the rows that backward computes: `(kept,)` int64,
ascending."""


class RowExecutor:
    """Restricts a step's update to chosen rows, the same on all ranks.

    A step calls, in this order: if the rows are known by then, `rest` before each forward pass or `choose` before each
    backward pass; `apply` in `Method.before_update`; `end_step` in `Method.after_update` and
    `Method.update_skipped`.

    Args:
        model: The model, whose layers are changed so that they can skip rows.
        shards: The engine's shards.
        layers: Linear layers of which rows are chosen, by name. Rows of other parameters run along their first
            dimension.
        dropped: What happens to the other rows. `gradient`: their gradient is zero, so momentum and weight decay still
            move them; `update`: weights and both moments keep every bit.
        skips: Whether rows are ever known before backward.
        mask_bias: Whether a layer's bias is masked like its weight; otherwise its gradient is computed in full.
        taps: The taps of the layers that have one, by module name.
        whole_gradients: Why whole gradients travel between the ranks even where backward has skipped rows, or None.
        whole_weights: Why whole weights are gathered after a step even where rows are frozen, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        shards: ShardView,
        layers: Mapping[str, TrackedLayer],
        *,
        dropped: Literal["gradient", "update"],
        skips: bool,
        mask_bias: bool = True,
        taps: Mapping[str, Tap] | None = None,
        whole_gradients: str | None = None,
        whole_weights: str | None = None,
    ) -> None:
        self._shards, self._taps = shards, taps or {}
        self._layouts = {name: _plain_layout(shards.shape(name)) for name in shards.names}
        self._layouts |= layouts_of(layers, mask_bias)
        self._skipping = skipping_layers(model, layers) if skips else {}
        self._skipped_names = frozenset(layouts_of(self._skipping, mask_bias))
        hooked = {name: layer.module for name, layer in self._skipping.items() if not layer.kind.tapped}
        self._skipper = RowSkipper(hooked, mask_bias) if skips else None
        self._freezer = RowFreezer(shards, self._layouts) if dropped == "update" else None
        self._whole_gradients, self._whole_weights = whole_gradients, whole_weights
        packed = () if whole_gradients else self._skipped_names
        self._exchange = CompactExchange(
            shards, self._layouts, packed, weights=dropped == "update" and not whole_weights
        )
        self._keep: Keep = {}
        self._rest = Rest(())
        self._resting: list[str] = []
        self.active = False

    @property
    def active(self) -> bool:
        """Whether forward passes of training prepare backward passes that skip rows. Each of these then needs a
        `choose`: without one it raises an error.
        """
        return self._active and self._skipper is not None

    @active.setter
    def active(self, active: bool) -> None:
        self._active = active
        if self._skipper is not None:
            self._skipper.active = active
        for tap in self._taps.values():
            tap.skips = self.active

    def rest(self, modules: Mapping[str, nn.Module]) -> None:
        """All rows of some modules' parameters are dropped, known before a forward pass, until the step ends.

        Backward computes nothing for them, unless whoever reduces the gradients waits for every one.

        Args:
            modules: By name in the model, with all that is in them; none contains another.
        """
        self._rest.end()
        self._rest = Rest(() if self._shards.needs_every_gradient else modules.values())
        below = tuple(f"{name}." for name in modules)
        self._resting = [name for name in self._shards.names if name.startswith(below)]
        self.choose({name: torch.zeros(self._layouts[name].total, dtype=torch.bool) for name in self._resting})

    def choose(self, keep: Keep, rows: Rows | None = None) -> None:
        """The step's rows are known before a backward pass. This is the only place that learns of them so early.

        Args:
            keep: The rows that the step updates, with those that its earlier backward passes have computed.
            rows: The rows that backward computes from now on, if they are fewer, or if the caller has their numbers
                anyway; by default those of `keep`, for which the host waits once per layer.
        """
        self._keep = keep
        self._exchange.choose(keep)
        if self._skipper is None:
            return
        numbers = {name: _numbers(layer, keep) for name, layer in self._skipping.items()} if rows is None else rows
        self._skipper.choose({name: matrices[0] for name, matrices in numbers.items()})
        for module, tap in self._taps.items():
            parts = {name: name.rpartition(".") for name in numbers}
            tap.rows = {last: list(numbers[name]) for name, (owner, _, last) in parts.items() if owner == module}

    def apply(self, keep: Keep | None = None) -> None:
        """The gradients are reduced: zero those of the rows that are not kept, and freeze the rows from here on.

        Args:
            keep: The step's rows, if they are known only now; by default those of the last `choose`.
        """
        skipped = self._skipped_names if keep is None and self.active else frozenset[str]()
        if keep is not None:
            self._keep = keep
            self._exchange.choose(keep)
        for name in self._resting:
            self._shards.fill_gradient(name)
        for name, kept in self._keep.items():
            # Skipped rows are zero already, unless a method before this one has added to them.
            if name in skipped and name not in self._shards.edited:
                continue
            shard = self._shards.gradient(name)
            if shard is not None:
                mask_rows_(shard.data, shard.start, self._layouts[name], kept.to(shard.data.device))
                self._shards.gradient_changed(name)
        if self._freezer is not None:
            self._freezer.freeze(self._keep)

    def forget(self) -> None:
        """Discard the rows after a backward pass, so that the next one cannot use them by mistake."""
        if self._skipper is not None:
            self._skipper.forget()
        for tap in self._taps.values():
            tap.rows = None

    def end_step(self) -> None:
        """The step is over, updated or not: forget its rows, and thaw them."""
        self.forget()
        self._rest.end()
        self._resting = []
        self._keep = {}
        self._exchange.clear()
        if self._freezer is not None:
            self._freezer.freeze({})

    def remove(self) -> None:
        """Restore the layers, and remove the hooks from modules and optimiser."""
        self._rest.end()
        if self._skipper is not None:
            self._skipper.remove()
        if self._freezer is not None:
            self._freezer.remove()
        self._exchange.remove()

    def message(self) -> str | None:
        """One line for the log about what travels between the ranks; None on a single one."""
        return self._exchange.message(self._whole_gradients, self._whole_weights)


def frozen_rows(elements: float) -> Cost:
    """What a step saves where so many of a rank's elements are frozen: the optimiser neither reads nor writes them."""
    return Cost(traffic=-ADAMW_BYTES * round(elements))


def layouts_of(layers: Mapping[str, TrackedLayer], mask_bias: bool) -> dict[str, RowLayout]:
    """The layout of the rows of each layer's weight, and with `mask_bias` of its bias, by parameter name."""
    layouts = {layer.weight: layer.layout for layer in layers.values()}
    if mask_bias:
        layouts |= {layer.bias: layer.bias_layout for layer in layers.values() if layer.bias is not None}
    return layouts


def skipping_layers(model: nn.Module, layers: Mapping[str, TrackedLayer]) -> dict[str, TrackedLayer]:
    """Those of the layers whose backward can leave out rows: all but routers, linear layers with a custom forward, and
    heads whose weight has the embedding's gradient too.
    """
    return {
        name: layer
        for name, layer in layers.items()
        if layer.kind.skips(layer.module) and not shares_weight(model, layer)
    }


def _plain_layout(shape: torch.Size) -> RowLayout:
    """Rows along the first dimension."""
    rows = shape[0] if shape else 1
    return RowLayout(1, rows, shape.numel() // rows)


def _numbers(layer: TrackedLayer, keep: Keep) -> list[torch.Tensor]:
    layout, kept = layer.layout, keep.get(layer.weight)
    if kept is None:
        return [torch.arange(layout.rows, device=next(layer.module.parameters()).device)] * layout.matrices
    return [matrix.nonzero()[:, 0] for matrix in kept.view(layout.matrices, layout.rows)]
