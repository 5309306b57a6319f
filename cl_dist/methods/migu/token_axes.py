"""Which of a layer's outputs belong to which token of the batch.

Shapes alone do not say: with one sample of eight tokens a table of eight positions looks like the batch. So the two
trial batches that an engine runs before its first step (`engine/trial.py`), whose numbers of samples, tokens and real
tokens are all different, show what each call of each layer is; training then goes by the call's place in the forward
pass and only checks the shape.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import permutations
from math import prod
from typing import Literal, NamedTuple

import torch

from cl_dist.errors import ClDistError

Form = Literal["tokens", "flat", "samples", "table"]
"""What the leading axes of an output are: the batch and the length each on an axis of its own, both on one, one vector
per sample, or something that is not of the batch (DeBERTa runs some layers over its table of relative positions)."""


class Call(NamedTuple):
    """One call of a layer in a forward pass."""

    form: Form
    kind: str = "input"
    """Which token mask fits: "input" or "target"."""
    axes: tuple[int, int] = (0, 1)
    """Of `tokens`: where batch and length are. Other axes hold several vectors of one token."""


class Trial(NamedTuple):
    """What a layer did with one trial batch."""

    shapes: list[torch.Size | None]
    """Leading shape of its outputs, call by call; None: the output is no tensor."""
    masks: Mapping[str, torch.Tensor]
    """The batch's real tokens, bool `(batch, length)`, by kind."""


def calls_of(trials: Sequence[Trial]) -> tuple[Call, ...] | str:
    """Every call that a layer makes in a forward pass, or why its outputs cannot be assigned to tokens."""
    counts = {len(trial.shapes) for trial in trials}
    if counts == {0}:
        return "its forward does not run"
    if len(counts) > 1:
        return "it does not run equally often in every forward pass"
    calls = []
    for seen in zip(*(trial.shapes for trial in trials), strict=True):
        shapes = [shape for shape in seen if shape is not None]
        if len(shapes) < len(seen):
            return "its output is not one tensor"
        readings = [_readings(shape, trial.masks) for shape, trial in zip(shapes, trials, strict=True)]
        possible = set.intersection(*readings)
        if not possible and _is_table(shapes, trials):
            possible = {Call("table")}
        if len(possible) != 1:
            return f"its outputs of shape {tuple(shapes[0])} are not the batch's tokens {_sizes(trials[0].masks)}"
        calls.append(possible.pop())
    return tuple(calls)


def _readings(leading: torch.Size, masks: Mapping[str, torch.Tensor]) -> set[Call]:
    """All that a leading shape can be read as."""
    found: set[Call] = set()
    for kind, mask in masks.items():
        batch, length = mask.shape
        places = permutations(range(len(leading)), 2)
        found |= {
            Call("tokens", kind, pair) for pair in places if (leading[pair[0]], leading[pair[1]]) == (batch, length)
        }
        if leading in ((batch * length,), (1, batch * length)):
            found.add(Call("flat", kind))
    if leading == (next(iter(masks.values())).shape[0],):
        found.add(Call("samples"))
    return found


def _is_table(shapes: Sequence[torch.Size], trials: Sequence[Trial]) -> bool:
    """Whether a call's outputs are not of the batch: the same for every batch, or of one row where it has several.

    The latter could also be the batch's real tokens, packed.
    """
    if len(set(shapes)) == 1:
        return True
    packed = any(
        prod(shape) == int(mask.sum())
        for shape, trial in zip(shapes, trials, strict=True)
        for mask in trial.masks.values()
    )
    return all(len(shape) > 1 and shape[0] == 1 for shape in shapes) and not packed


def _sizes(masks: Mapping[str, torch.Tensor]) -> str:
    return " or ".join(str(tuple(mask.shape)) for mask in masks.values())


def counted(call: Call, leading: torch.Size, masks: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    """Bool of a shape that broadcasts to `leading`: the outputs of real tokens.

    Raises:
        ClDistError: The outputs of layer `name` do not have the shape that the trial has shown.
    """
    mask = masks[call.kind]
    batch, length = call.axes
    if call.form == "samples" and leading == mask.shape[:1]:
        return mask.any(dim=1)
    if call.form == "flat" and prod(leading) == mask.numel():
        return mask.reshape(leading)
    if call.form == "tokens" and max(call.axes) < len(leading) and (leading[batch], leading[length]) == mask.shape:
        ordered = mask if batch < length else mask.t()
        return ordered.reshape([size if axis in call.axes else 1 for axis, size in enumerate(leading)])
    raise ClDistError(
        f"layer {name}: outputs of shape {tuple(leading)} do not fit a batch of {tuple(mask.shape)} tokens, as they "
        f"did before training ({call.form})"
    )
