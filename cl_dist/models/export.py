"""Writes a model or its adapter in Hugging Face format, from weights collected beforehand."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cl_dist.models.kept_parts import is_kept
from cl_dist.models.lora import adapter_names, in_adapter, joined_adapters
from cl_dist.models.structure import whole_shape
from cl_dist.models.training_mode import cache_as_loaded


def export_model(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    state_dict: Mapping[str, Tensor],
) -> None:
    """Write model and tokenizer into `folder`, to be loaded with `from_pretrained`. One process calls.

    Of a PeftModel only the adapter is written, and several adapters are joined into one.

    Args:
        model: Supplies names, shapes and configuration. Its own parameters are never read, so they may be sharded.
        tokenizer: Written beside the model.
        folder: Where to write.
        state_dict: Whole CPU tensors under the names of `model.named_parameters()`; of a PeftModel at least those
            `in_adapter`.

    Raises:
        ValueError: A tensor is missing, or its shape differs from the model's.
    """
    adapter = isinstance(model, PeftModel)
    # The trained part of a weight is in the weight too, under whose name everyone else looks for it.
    own = {name: p for name, p in model.named_parameters() if not is_kept(name)}
    parameters = {name: p for name, p in own.items() if not adapter or in_adapter(name, p)}
    _check_complete(parameters, state_dict)
    weights = {name: state_dict[name].detach().contiguous() for name in parameters}
    if isinstance(model, PeftModel):
        _save_adapter(model, folder, weights)
    else:
        # Persistent buffers come from the model itself: no stage of ZeRO shards them.
        shared = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        buffers = {name: tensor for name, tensor in model.state_dict().items() if name not in shared}
        with cache_as_loaded(model):
            model.save_pretrained(folder, state_dict={**weights, **buffers})
    tokenizer.save_pretrained(folder)


def is_readable_export(folder: Path) -> bool:
    """Whether `folder` holds weights, and each file is as long as its header says."""
    files = list(folder.glob("*.safetensors"))
    try:
        for file in files:
            with safe_open(file, framework="pt"):
                pass
    except (SafetensorError, OSError):
        return False
    return bool(files)


def _check_complete(parameters: Mapping[str, torch.nn.Parameter], state_dict: Mapping[str, Tensor]) -> None:
    """Check that every parameter has its tensor, in full shape."""
    if missing := [name for name in parameters if name not in state_dict]:
        raise ValueError(f"{len(missing)} tensors are missing from the weights to write, the first is {missing[0]}")
    for name, parameter in parameters.items():
        shape = tuple(whole_shape(parameter))
        if tuple(state_dict[name].shape) != shape:
            raise ValueError(f"{name} has shape {tuple(state_dict[name].shape)}, but {shape} in the model")


def _save_adapter(model: PeftModel, folder: Path, weights: dict[str, Tensor]) -> None:
    """Write adapter weights and configuration; several adapters become one whose rank is the sum of theirs."""
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
            save_embedding_layers=False,  # adapters never hold the embedding; peft would ask the Hub to find that out
        )
    finally:
        model.peft_config[names[0]] = configuration
    (folder / "README.md").unlink(missing_ok=True)  # peft's model card, an empty form
