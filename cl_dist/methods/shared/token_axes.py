"""Which of a layer's outputs belong to which token of the batch.

Shapes are ambiguous: with one sample of eight tokens, a table of eight positions looks like the batch. So an engine
first runs two trial batches whose numbers of samples, tokens and real tokens all differ (`engine/trial.py`). They show
what each call of each layer is; training then identifies a call by its position in the forward pass and only checks
the shape.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import permutations
from math import prod
from typing import Literal, NamedTuple

import torch

from cl_dist.errors import ClDistError

Form = Literal["tokens", "flat", "samples", "table"]
"""What the leading axes of an output are: batch and length on separate axes, both on one axis, one vector per sample,
or something unrelated to the batch (DeBERTa runs some layers over its table of relative positions)."""


class Call(NamedTuple):
    """One call of a layer in a forward pass."""

    form: Form
    kind: str = "input"
    """The token mask that applies: "input" or "target"."""
    axes: tuple[int, int] = (0, 1)
    """For `tokens`: the axes of batch and length. Other axes hold several vectors of one token."""


class Trial(NamedTuple):
    """What a layer did with one trial batch."""

    shapes: list[torch.Size | None]
    """Leading shape of its output in each call; None: the output is not a tensor."""
    masks: Mapping[str, torch.Tensor]
    """The batch's real tokens, bool `(batch, length)`, by kind."""


def calls_of(trials: Sequence[Trial]) -> tuple[Call, ...] | str:
    """Each call of a layer in a forward pass, or the reason why its outputs cannot be assigned to tokens."""
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
        # Exactly one interpretation must fit both trials; the table is the last resort.
        readings = [_readings(shape, trial.masks) for shape, trial in zip(shapes, trials, strict=True)]
        possible = set.intersection(*readings)
        if not possible and _is_table(shapes, trials):
            possible = {Call("table")}
        if len(possible) != 1:
            tokens = " or ".join(str(tuple(mask.shape)) for mask in trials[0].masks.values())
            return f"its outputs of shape {tuple(shapes[0])} are not the batch's tokens {tokens}"
        calls.append(possible.pop())
    return tuple(calls)


def _readings(leading: torch.Size, masks: Mapping[str, torch.Tensor]) -> set[Call]:
    """All possible interpretations of a leading shape."""
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
    """Whether outputs are unrelated to the batch: the same shape for every batch, or one row for several samples.

    One row could also hold the batch's real tokens, packed; that is not a table.
    """
    if len(set(shapes)) == 1:
        return True
    packed = any(
        prod(shape) == int(mask.sum())
        for shape, trial in zip(shapes, trials, strict=True)
        for mask in trial.masks.values()
    )
    return all(len(shape) > 1 and shape[0] == 1 for shape in shapes) and not packed


def counted(call: Call, leading: torch.Size, masks: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    """Mask of the outputs of real tokens, bool in a shape that broadcasts to `leading`.

    Raises:
        ClDistError: The outputs of layer `name` do not have the form that they had in the trials.
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
