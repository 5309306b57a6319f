"""Which part of a model a layer belongs to: the blocks, the output head, or neither (embeddings, poolers)."""

from __future__ import annotations

from typing import cast

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

LINEAR = (nn.Linear, Conv1D)
"""Linear layers; GPT-2's Conv1D is one with its weight transposed."""


def base_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a PeftModel, or the model itself."""
    return cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)


def block_prefixes(model: nn.Module) -> tuple[str, ...]:
    """Names (each ending in a dot) of the lists of transformer blocks: the outermost `nn.ModuleList`s of the model."""
    prefixes: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not name.startswith(tuple(prefixes)):
            prefixes.append(f"{name}.")
    return tuple(prefixes)


def head_prefixes(model: nn.Module) -> tuple[str, ...]:
    """Names of the modules that make up the output head, as they appear in `model.named_modules()`.

    They are the children of the transformers model beside its body: `lm_head`, `score`, `classifier`, `cls`.
    """
    base = base_model(model)
    prefix = next(name for name, module in model.named_modules() if module is base)
    body = {base.base_model_prefix, "encoder", "decoder", "shared"}
    return tuple(f"{prefix}.{child}".lstrip(".") for child, _ in base.named_children() if child not in body)


def is_below(name: str, prefixes: tuple[str, ...]) -> bool:
    """Whether a module's name is one of the prefixes or lies below one."""
    return any(name == prefix.rstrip(".") or name.startswith(f"{prefix.rstrip('.')}.") for prefix in prefixes)
