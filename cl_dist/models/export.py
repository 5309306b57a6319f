"""Writes a model or its adapter in Hugging Face format, from weights that were collected beforehand."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cl_dist.models.cache_setting import cache_as_loaded
from cl_dist.models.lora import adapter_names, in_adapter, joined_adapters


def export_model(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    state_dict: Mapping[str, Tensor],
) -> None:
    """Write `model` with the weights of `state_dict` and the tokenizer into `folder`, loadable with `from_pretrained`.

    `state_dict` has whole CPU tensors by the names of `model.named_parameters()`: all of them, or, where `model` is a
    PeftModel, at least those `in_adapter`; only the adapter is written then, several of them as one. The model's own
    parameters are not read, they may be sharded. One process calls. Raises ValueError where a tensor is missing or has
    another shape than the model's.
    """
    adapter = isinstance(model, PeftModel)
    parameters = {name: p for name, p in model.named_parameters() if not adapter or in_adapter(name, p)}
    _check_complete(parameters, state_dict)
    weights = {name: state_dict[name].detach().contiguous() for name in parameters}
    if isinstance(model, PeftModel):
        _save_adapter(model, folder, weights)
    else:
        with cache_as_loaded(model):
            model.save_pretrained(folder, state_dict={**weights, **_buffers(model)})
    tokenizer.save_pretrained(folder)


def is_readable_export(folder: Path) -> bool:
    """Whether `folder` holds weights, and every file of them has its header and all the bytes that it speaks of."""
    files = list(folder.glob("*.safetensors"))
    try:
        for file in files:
            with safe_open(file, framework="pt"):
                pass
    except (SafetensorError, OSError):
        return False
    return bool(files)


def _check_complete(parameters: Mapping[str, torch.nn.Parameter], state_dict: Mapping[str, Tensor]) -> None:
    """Every parameter's tensor is there, in its full shape (which ZeRO-3 keeps in `ds_shape`)."""
    if missing := [name for name in parameters if name not in state_dict]:
        raise ValueError(f"{len(missing)} tensors are missing from the weights to be written, {missing[0]} first")
    for name, parameter in parameters.items():
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        if tuple(state_dict[name].shape) != shape:
            raise ValueError(f"{name} has the shape {tuple(state_dict[name].shape)}, the model's is {shape}")


def _buffers(model: PreTrainedModel) -> dict[str, Tensor]:
    """The persistent buffers: no stage of ZeRO shards them."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in parameters}


def _save_adapter(model: PeftModel, folder: Path, weights: dict[str, Tensor]) -> None:
    """Adapter weights and configuration, without peft's model card, an empty form. Several adapters become one, whose
    rank is the sum of theirs.

    The embedding is never part of an adapter here, and peft's own check for that would look the base model up on the
    hub.
    """
    names = adapter_names(model)
    configuration = model.peft_config[names[0]]
    assert isinstance(configuration, LoraConfig)
    scaled = copy.copy(configuration)
    scaled.r, scaled.lora_alpha = len(names) * configuration.r, len(names) * configuration.lora_alpha
    model.peft_config[names[0]] = scaled
    try:
        model.save_pretrained(
            str(folder),
            selected_adapters=names[:1],
            state_dict=joined_adapters(weights, names),
            save_embedding_layers=False,
        )
    finally:
        model.peft_config[names[0]] = configuration
    (folder / "README.md").unlink(missing_ok=True)
