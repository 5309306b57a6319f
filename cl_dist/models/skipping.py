"""Linear layers whose backward pass computes only chosen rows of the weight gradient.

The layers keep their type; each gets a `forward` of its own on the instance, which its kind supplies (`LayerKind`).
Hooks (DeepSpeed's gather and release, PEFT's, the user's) keep working, and removing the forward restores the layer.
Kinds that are seen through a tap skip rows there.
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
    """Puts the skipping forward into `layers`, and gives each its rows.

    Between `active = True` and the backward pass `choose` must be called; a backward pass without rows is an error, not
    a dense gradient. Inactive (the start), outside training and without gradients the layers run as they did before.
    Activation checkpointing, autocast and ZeRO-3 work; under `torch.compile` the layers run uncompiled.

    Args:
        layers: By name, layers whose weights are trained.
        mask_bias: Mask the bias's gradient along; false: it is computed whole.

    Raises:
        BadInput: A layer's forward is not one whose rows any kind can skip, so replacing it would change what the layer
            computes.
    """

    def __init__(self, layers: Mapping[str, nn.Module], mask_bias: bool = True) -> None:
        kinds = {name: _kind_of(name, layer) for name, layer in layers.items()}
        self._layers = dict(layers)
        self._switch = _Switch()
        self._rows = {name: ChosenRows(name, mask_bias) for name in layers}
        for name, layer in layers.items():
            # On the instance: DeepSpeed and PEFT look at the type, which stays what it was.
            layer.forward = _skipping_forward(layer, kinds[name], self._switch, self._rows[name])

    @property
    def active(self) -> bool:
        """Whether forward passes of training prepare for skipping rows."""
        return self._switch.active

    @active.setter
    def active(self, value: bool) -> None:
        self._switch.active = value

    def choose(self, rows: Mapping[str, torch.Tensor]) -> None:
        """Set the rows of every layer for the backward passes that follow: `(kept,)` int64, ascending, by name."""
        for name, chosen in self._rows.items():
            chosen.rows = rows[name]

    def forget(self) -> None:
        """The backward pass is over; the next one needs rows of its own."""
        for chosen in self._rows.values():
            chosen.rows = None

    def remove(self) -> None:
        """Give every layer its own forward back."""
        for layer in self._layers.values():
            layer.__dict__.pop("forward", None)


@dataclass
class _Switch:
    """One for all layers of a model."""

    active: bool = False


def _kind_of(name: str, layer: nn.Module) -> LayerKind:
    kind = skipping_kind(layer)
    if "forward" in layer.__dict__ or kind is None:
        owner = getattr(layer.__dict__.get("forward", type(layer).forward), "__module__", "another library")
        raise BadInput(
            f"method.skip_rows: the forward of layer {name} ({type(layer).__name__}) has been replaced by {owner}, and "
            "skipping rows would replace it again; allowed for this model is method.skip_rows: false"
        )
    return kind


def _skipping_forward(
    layer: nn.Module, kind: LayerKind, switch: _Switch, chosen: ChosenRows
) -> Callable[..., torch.Tensor]:
    plain, skipping = type(layer).forward, kind.skipping_forward(layer, chosen)

    # Traced, backward would look for its rows while it is compiled, before they are chosen.
    @torch.compiler.disable(recursive=True, reason="the rows that backward computes are chosen anew in every step")
    def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
        active = switch.active and layer.training and torch.is_grad_enabled()
        output: torch.Tensor = skipping(*args, **kwargs) if active else plain(layer, *args, **kwargs)
        return output

    return forward
