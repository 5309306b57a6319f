"""The parts of a model: transformer blocks, output head, and the rest (embeddings, poolers, towers for pictures)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from cl_dist.errors import BadInput


def base_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a PeftModel, or the model itself."""
    return cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)


def block_prefixes(model: nn.Module) -> tuple[str, ...]:
    """The lists of transformer blocks: names of the outermost `nn.ModuleList`s, each followed by a dot."""
    prefixes: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not name.startswith(tuple(prefixes)):
            prefixes.append(f"{name}.")
    return tuple(prefixes)


def head_prefixes(model: nn.Module) -> tuple[str, ...]:
    """Names of the modules that make up the output head, as in `model.named_modules()`.

    These are the children of the transformers model other than its body: `lm_head`, `score`, `classifier`, `cls`. The
    body is the child with the embeddings, whatever its name.
    """
    base = base_model(model)
    prefix = next(name for name, module in model.named_modules() if module is base)
    body, embeddings = {base.base_model_prefix, "encoder", "decoder", "shared"}, base.get_input_embeddings()
    heads = (
        name
        for name, child in base.named_children()
        if name not in body and not any(module is embeddings for module in child.modules())
    )
    return tuple(f"{prefix}.{name}".lstrip(".") for name in heads)


def unread_parameters(model: nn.Module) -> frozenset[str]:
    """Names (as in `model.named_parameters()`) of parameters that text never passes through: a multimodal model's
    towers and their projectors. Empty for a text-only model.
    """
    base = base_model(model)
    if base.config.is_encoder_decoder or base.config.get_text_config() is base.config:
        return frozenset()
    heads = [base.get_submodule(name) for name in head_prefixes(base)]
    embeddings = (base.get_input_embeddings(), base.get_output_embeddings())
    read = [part for part in (base.get_decoder(), *embeddings, *heads) if part is not None]
    known = {id(parameter) for part in read for parameter in part.parameters()}
    return frozenset(name for name, parameter in model.named_parameters() if id(parameter) not in known)


def separate_blocks(model: nn.Module, method: str) -> dict[str, nn.Module]:
    """The transformer blocks that text passes through, by name, in model order. Each can rest by itself.

    Raises:
        BadInput: There are none, or two of them share a weight; `method` is named in the message.
    """
    unread, blocks = unread_parameters(model), dict[str, nn.Module]()
    owners: dict[int, str] = {}
    for prefix in block_prefixes(model):
        for number, block in model.get_submodule(prefix.rstrip(".")).named_children():
            parameters = {f"{prefix}{number}.{name}": parameter for name, parameter in block.named_parameters()}
            if set(parameters) <= unread:
                continue
            blocks[f"{prefix}{number}"] = block
            for name, parameter in parameters.items():
                if (owner := owners.setdefault(id(parameter), f"{prefix}{number}")) != f"{prefix}{number}":
                    raise BadInput(
                        f"method: {method} trains blocks one by one, but {name} belongs to {owner} too; allowed are "
                        "models whose blocks share no weights"
                    )
    if not blocks:
        raise BadInput(f"method: {method} needs transformer blocks, and {type(base_model(model)).__name__} has none")
    return blocks


def is_below(name: str, prefixes: Iterable[str]) -> bool:
    """Whether a module's name is one of the prefixes or lies below one."""
    return any(name == prefix.rstrip(".") or name.startswith(f"{prefix.rstrip('.')}.") for prefix in prefixes)


def is_sharded(parameter: torch.Tensor) -> bool:
    """Whether the ranks each hold a piece of the parameter, which ZeRO-3 gathers when a layer needs it."""
    return hasattr(parameter, "ds_id")


def whole_shape(parameter: torch.Tensor) -> torch.Size:
    """Shape of the unsharded parameter, which ZeRO-3 keeps in `ds_shape`."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape
