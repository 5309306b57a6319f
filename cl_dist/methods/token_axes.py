"""Which of a layer's outputs belong to which token of the batch.

Shapes alone do not say: with one sample of eight tokens a table of eight positions looks like the batch. So the two
trial batches that an engine runs before its first step (`engine/trial.py`), whose numbers of samples, tokens and real
tokens are all different, show what each call of each layer is; training then goes by the call's place in the forward
pass and only checks the shape.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Literal, NamedTuple

import torch

from cl_dist.errors import ClDistError

Form = Literal["tokens", "swapped", "flat", "samples", "table"]
"""What the leading axes of an output are: `(batch, length, ...)`, `(length, batch)`, both in one, one vector per sample,
or something that is not of the batch (DeBERTa runs some layers over its table of relative positions)."""


class Call(NamedTuple):
    """One call of a layer in a forward pass."""

    form: Form
    kind: str
    """Which token mask fits: "input" or "target"."""


class Trial(NamedTuple):
    """What a layer did with one trial batch."""

    shapes: list[torch.Size]
    """Leading shape of its outputs, call by call."""
    masks: Mapping[str, torch.Tensor]
    """The batch's real tokens, bool `(batch, length)`, by kind."""


def calls_of(trials: Sequence[Trial]) -> tuple[Call, ...] | str:
    """Every call that a layer makes in a forward pass, or the reason why it cannot be told whose outputs they are."""
    counts = {len(trial.shapes) for trial in trials}
    if counts == {0}:
        return "its forward does not run"
    if len(counts) > 1:
        return "it does not run equally often in every forward pass"
    calls = []
    for shapes in zip(*(trial.shapes for trial in trials), strict=True):
        forms = {_call(shape, trial.masks) for shape, trial in zip(shapes, trials, strict=True)}
        found = forms.pop() if len(forms) == 1 else None
        if found is None and _is_table(shapes, trials):
            found = Call("table", "input")
        if found is None:
            return f"its outputs of shape {tuple(shapes[0])} are not the batch's tokens {_sizes(trials[0].masks)}"
        calls.append(found)
    return tuple(calls)


def _call(leading: torch.Size, masks: Mapping[str, torch.Tensor]) -> Call | None:
    for kind, mask in masks.items():
        batch, length = mask.shape
        if leading[:2] == (batch, length):
            return Call("tokens", kind)
        if leading == (length, batch):
            return Call("swapped", kind)
        if leading in ((batch * length,), (1, batch * length)):
            return Call("flat", kind)
        if leading == (batch,):
            return Call("samples", kind)
    return None


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
    """Bool, one per output vector, or of a shape that broadcasts to `leading`: the outputs of real tokens.

    Raises:
        ClDistError: The outputs of layer `name` do not have the shape that the trial has shown.
    """
    mask = masks[call.kind]
    if call.form == "samples":
        mask = mask.any(dim=1)
    elif call.form == "swapped":
        mask = mask.t()
    fits = leading[: mask.dim()] == mask.shape if call.form != "flat" else prod(leading) == mask.numel()
    if not fits:
        raise ClDistError(
            f"layer {name}: outputs of shape {tuple(leading)} do not fit a batch of {tuple(masks[call.kind].shape)} tokens, "
            f"as they did before training ({call.form})"
        )
    if call.form == "flat":
        return mask.reshape(leading)
    extra = len(leading) - mask.dim() if call.form == "tokens" else 0
    return mask.reshape(*mask.shape, *(1 for _ in range(extra)))
