"""Questions to a model that may be wrapped by peft and sharded by DeepSpeed."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from cl_dist.heartbeat import beat
from cl_dist.models.structure import base_model
from cl_dist.models.training_mode import kept_capacities


def accepts(model: nn.Module, argument: str) -> bool:
    """Whether the transformers model's forward names this argument."""
    return argument in inspect.signature(type(base_model(model)).forward).parameters


def device_of(model: nn.Module) -> torch.device:
    """Where inputs must be; a sharded parameter keeps its device even while it holds nothing."""
    return next(model.parameters()).device


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout and no gradients inside; afterwards every module is back in the mode it was in.

    Every forward pass is a mark of progress: a long answer takes many.

    `no_grad`, not `inference_mode`: ZeRO-3 keeps the tensors it gathers, and an inference tensor cannot be trained on.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    marks = base_model(model).register_forward_pre_hook(lambda *_: beat())
    try:
        with torch.no_grad(), kept_capacities(model):
            yield
    finally:
        marks.remove()
        for module in training:
            module.training = True
