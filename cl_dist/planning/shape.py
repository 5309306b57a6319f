"""The shape of a recipe's model: the real model, with its adapters, on the meta device, which holds no numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import nn
from transformers import PreTrainedConfig

from cl_dist.config.objectives import ObjectiveName
from cl_dist.config.schema import Recipe
from cl_dist.engine.settings import optimizer_groups
from cl_dist.methods.composed import compose
from cl_dist.methods.protocol import Method
from cl_dist.models.kept_parts import is_kept
from cl_dist.models.load import model_on_meta
from cl_dist.models.lora import add_lora
from cl_dist.models.structure import base_model
from cl_dist.models.training_mode import enable_activation_checkpointing, switch_cache_off

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Parameter:
    """One parameter of the model."""

    name: str
    shape: tuple[int, ...]
    trainable: bool
    itemsize: int
    """Bytes per element."""

    @property
    def numel(self) -> int:
        """Elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole parameter."""
        return self.numel * self.itemsize


@dataclass(frozen=True)
class ModelShape:
    """A model without its numbers. Shared weights count once."""

    model: nn.Module
    """On the meta device, with adapters and activation checkpointing as the recipe says."""
    objective: ObjectiveName
    parameters: tuple[Parameter, ...]
    """In model order."""
    groups: tuple[tuple[Parameter, ...], ...]
    """AdamW's groups of trainable parameters, in the order in which DeepSpeed flattens them."""
    buffer_bytes: int
    method: Method
    """The recipe's methods, which have prepared the model."""

    @cached_property
    def trainable(self) -> Mapping[str, Parameter]:
        """The trainable parameters by name, in model order."""
        return {each.name: each for each in self.parameters if each.trainable}

    @property
    def numel(self) -> int:
        """Elements of all parameters."""
        return sum(each.numel for each in self.parameters)

    @property
    def own_numel(self) -> int:
        """Elements of the model itself: a trained part of a weight is in the weight already."""
        return sum(each.numel for each in self.parameters if not is_kept(each.name))

    @property
    def nbytes(self) -> int:
        """Bytes of all parameters."""
        return sum(each.nbytes for each in self.parameters)

    @property
    def vocabulary(self) -> int:
        """Outputs of a language model's head, before any padding."""
        return int(getattr(base_model(self.model).config.get_text_config(), "vocab_size", 0))


def describe_model(recipe: Recipe, config: PreTrainedConfig | None = None, labels: int = 2) -> ModelShape:
    """Build the recipe's model on the meta device: its files may lack weights and tokenizer, or all but `config`.

    Args:
        recipe: The recipe.
        config: The model's configuration; None: the one that the recipe's model has.
        labels: Classes of a classifier.

    Raises:
        BadInput: The model cannot be built or adapted.
    """
    built, objective = model_on_meta(recipe.model, labels, DTYPES[recipe.train.dtype], config)
    model: nn.Module = built
    if recipe.model.lora is not None:
        with torch.device("meta"):
            model = add_lora(built, recipe.model.lora, objective, recipe.train.seed)
    if recipe.train.activation_checkpointing:
        enable_activation_checkpointing(model)
    method = compose(recipe.method)
    method.prepare_model(model, recipe.train.seed)
    switch_cache_off(model)
    parameters = tuple(
        Parameter(name, tuple(each.shape), each.requires_grad, each.element_size())
        for name, each in model.named_parameters()
    )
    by_name = {each.name: each for each in parameters}
    groups = tuple(tuple(by_name[name] for name in group) for group in optimizer_groups(model) if group)
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    return ModelShape(model, objective, parameters, groups, buffers, method)
