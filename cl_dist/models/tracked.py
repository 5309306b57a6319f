"""Which linear layers MIGU looks at, and over which tokens of the batch each of them runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from torch import nn

from cl_dist.errors import BadInput
from cl_dist.models.structure import base_model, block_prefixes, head_prefixes, is_below

CROSS_ATTENTION = frozenset({"EncDecAttention", "encoder_attn", "cross_attn", "crossattention"})
KEY_OR_VALUE = frozenset({"k", "v", "k_proj", "v_proj", "key", "value", "key_proj", "value_proj"})


def tracked_linears(model: nn.Module, layers: Literal["blocks", "all"]) -> dict[str, nn.Linear]:
    """The trainable linear layers inside the transformer blocks, with `all` those of the output head as well.

    With LoRA the matrices A and B are such layers, each by itself, and the frozen layers beside them are not. The
    keys are names of `model.named_modules()`, in model order, so that `key + ".weight"` is a name of
    `model.named_parameters()`. Raises BadInput where there is no such layer, or where one's weight belongs to another
    layer as well.
    """
    prefixes = block_prefixes(model) + (head_prefixes(model) if layers == "all" else ())
    tracked = {name: linear for name, linear in _trainable_linears(model) if is_below(name, prefixes)}
    if not tracked:
        raise BadInput(
            f"method.layers: {type(base_model(model)).__name__} has no trainable nn.Linear layer inside transformer "
            "blocks, which MIGU needs; use another model, or LoRA"
        )
    _refuse_shared_weights(model, tracked)
    return tracked


def _trainable_linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Every linear layer under each of its names, with a weight that is trained itself."""
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear) and isinstance(module.weight, nn.Parameter) and module.weight.requires_grad:
            yield name, module


def _refuse_shared_weights(model: nn.Module, tracked: dict[str, nn.Linear]) -> None:
    """Masking a shared weight's rows would also mask what its other owner learns, unseen by the magnitudes."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    for name, linear in tracked.items():
        if others := [owner for owner in owners[id(linear.weight)] if owner != name]:
            raise BadInput(
                f"method.layers: the weight of {name} is also that of {others[0]}, whose rows would be masked along; "
                "allowed for this model is method.layers: blocks"
            )


def token_mask_of(name: str, model: nn.Module) -> Literal["input", "target"]:
    """Which of a batch's token masks fits the outputs of the tracked layer `name`.

    `input` are the tokens that an encoder or a decoder-only model reads, `target` the decoder's of an encoder-decoder.
    There, keys and values of the cross-attention are computed from the encoder's tokens.
    """
    if not base_model(model).config.is_encoder_decoder:
        return "input"
    parts = name.split(".")
    if "encoder" in parts and "decoder" not in parts:
        return "input"
    if CROSS_ATTENTION.intersection(parts) and KEY_OR_VALUE.intersection(parts):
        return "input"
    return "target"
