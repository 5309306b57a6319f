"""Initial weights that depend only on the seed and the parameter's name.

A new model, head or adapter therefore starts with the same numbers under every ZeRO stage, on any number of ranks and
in any order of construction. The scales are those of the architectures' papers: T5 does not divide its attention scores
by the square root of their width, and puts that factor into the initial query weights instead (arXiv 1910.10683).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from cl_dist.models.structure import base_model, is_sharded

DEFAULT_STD = 0.02
"""For configurations without an `initializer_range`."""


@torch.no_grad()
def initialise_(model: nn.Module, seed: int, only: Collection[str] | None = None) -> None:
    """Initialise every parameter of `model`, or those in `only` (named as in `named_parameters()`), in place.

    Norm weights become 1, biases 0, matrices normal with the family's scale. LoRA's A becomes uniform like a linear
    layer's default, and its B 0. Under ZeRO-3 this gathers one parameter at a time and rank 0 writes it, so every rank
    must call.
    """
    config = base_model(model).config
    for name, parameter in model.named_parameters():
        if only is not None and name not in only:
            continue
        with _whole(parameter):
            if parameter.numel():  # empty on the ranks that do not write
                owner = model.get_submodule(name.rpartition(".")[0])
                parameter.copy_(_initial(name, owner, parameter.shape, config, seed))


def _whole(parameter: nn.Parameter) -> AbstractContextManager[object]:
    """Return a context in which the parameter can be written whole, gathered if ZeRO-3 has sharded it."""
    if not is_sharded(parameter):
        return nullcontext()
    import deepspeed

    gathered: AbstractContextManager[object] = deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)
    return gathered


def _initial(name: str, owner: nn.Module, shape: torch.Size, config: PreTrainedConfig, seed: int) -> Tensor:
    """Draw the initial value (float32, on the CPU) of the parameter `name`, held by the module `owner`."""
    if name.endswith("bias") or ".lora_B." in name:
        return torch.zeros(shape)
    if len(shape) < 2:
        return torch.ones(shape)
    generator = torch.Generator().manual_seed(named_seed(seed, name))
    if ".lora_A." in name:
        # Kaiming-uniform with a = sqrt(5), in other words a bound of 1 / sqrt(fan-in): peft's default for A.
        bound = 1.0 / math.sqrt(shape[1])
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)
    value = torch.empty(shape).normal_(0.0, _std(name, shape, config), generator=generator)
    if isinstance(owner, nn.Embedding) and owner.padding_idx is not None:
        value[owner.padding_idx] = 0.0
    return value


def named_seed(seed: int, name: str) -> int:
    """Derive a 63-bit seed from a run's seed and a name; the same on every machine, unlike Python's `hash`."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _std(name: str, shape: torch.Size, config: PreTrainedConfig) -> float:
    """Return the standard deviation of a matrix; `shape` is (out_features, in_features) or (entries, width)."""
    if config.model_type not in ("t5", "mt5", "umt5"):
        return float(getattr(config, "initializer_range", DEFAULT_STD))
    factor = float(config.initializer_factor)
    if name.endswith("shared.weight"):
        return factor
    if name.endswith(".q.weight"):
        return factor * float(config.d_model * config.d_kv) ** -0.5
    if name.endswith("relative_attention_bias.weight"):
        return factor * float(config.d_model) ** -0.5
    return factor * float(shape[1]) ** -0.5
