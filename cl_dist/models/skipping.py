"""Makes the backward pass of linear layers compute only chosen rows of the weight gradient.

The layers keep their type: each instance gets a new `forward`, supplied by its kind (`LayerKind`). Hooks (DeepSpeed's
gather and release, PEFT's, the user's) keep working, and removing the forward restores the layer. Kinds with a tap skip
rows in the tap instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cl_dist.errors import BadInput
from cl_dist.models.layer_kinds import LayerKind, skipping_kind
from cl_dist.models.row_gradients import ChosenRows


class RowSkipper:
    """Installs row-skipping forwards in `layers`, and sets the rows that their backward passes compute.

    Once `active` is true, call `choose` before the backward pass: without chosen rows it raises an error and never
    falls back to a dense gradient. While inactive (the default), outside training and without gradients, the layers run
    as before. Activation checkpointing, autocast and ZeRO-3 work; under `torch.compile` the layers run uncompiled.

    Args:
        layers: Layers with trained weights, by name.
        mask_bias: Mask the bias's gradient too; otherwise it is computed in full.

    Raises:
        BadInput: No kind can skip rows in a layer's forward, so replacing it would change what the layer computes.
    """

    def __init__(self, layers: Mapping[str, nn.Module], mask_bias: bool = True) -> None:
        kinds = {name: _kind_of(name, layer) for name, layer in layers.items()}  # before any layer is changed
        self._layers = dict(layers)
        self._switch = _Switch()
        self._rows = {name: ChosenRows(name, mask_bias) for name in layers}
        for name, layer in layers.items():
            # Set on the instance, because DeepSpeed and PEFT look at the type.
            layer.forward = _skipping_forward(layer, kinds[name], self._switch, self._rows[name])

    @property
    def active(self) -> bool:
        """Whether training forward passes prepare a backward pass that skips rows."""
        return self._switch.active

    @active.setter
    def active(self, value: bool) -> None:
        self._switch.active = value

    def choose(self, rows: Mapping[str, torch.Tensor]) -> None:
        """Set the rows of each layer, by name, for the next backward passes: `(kept,)` int64, ascending."""
        for name, chosen in self._rows.items():
            chosen.rows = rows[name]

    def forget(self) -> None:
        """Discard the rows after a backward pass, so that the next one cannot use them by mistake."""
        for chosen in self._rows.values():
            chosen.rows = None

    def remove(self) -> None:
        """Restore each layer's own forward."""
        for layer in self._layers.values():
            layer.__dict__.pop("forward", None)


@dataclass
class _Switch:
    """Shared by all layers of a model."""

    active: bool = False


def _kind_of(name: str, layer: nn.Module) -> LayerKind:
    kind = skipping_kind(layer)
    if "forward" in layer.__dict__ or kind is None:
        owner = getattr(layer.__dict__.get("forward", type(layer).forward), "__module__", "another library")
        raise BadInput(
            f"method.skip_rows: the forward of layer {name} ({type(layer).__name__}) has been replaced by {owner}, and "
            "skipping rows would override it; allowed for this model is method.skip_rows: false"
        )
    return kind


def _skipping_forward(
    layer: nn.Module, kind: LayerKind, switch: _Switch, chosen: ChosenRows
) -> Callable[..., torch.Tensor]:
    plain, skipping = type(layer).forward, kind.skipping_forward(layer, chosen)

    # If it were traced, backward would look up its rows at compile time, before they are chosen.
    @torch.compiler.disable(recursive=True, reason="the rows that backward computes are chosen anew in every step")
    def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
        active = switch.active and layer.training and torch.is_grad_enabled()
        output: torch.Tensor = skipping(*args, **kwargs) if active else plain(layer, *args, **kwargs)
        return output

    return forward
