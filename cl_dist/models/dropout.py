"""Whether a model draws random numbers while it trains."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from cl_dist.models.structure import base_model


def layerdrop(model: nn.Module) -> dict[str, float]:
    """Settings of the model's configuration that leave out whole layers at random in training, where they are on."""
    settings = base_model(model).config.to_dict()
    return {name: value for name, value in settings.items() if "layerdrop" in name and value}


_MARKS = ("dropout", "pdrop")
"""Parts of the names under which transformers' configurations keep dropout probabilities."""


def has_dropout(model: nn.Module) -> bool:
    """Whether any dropout of the model has a probability above zero: its modules', its adapters', its attention's."""
    if any(isinstance(module, _DropoutNd) and module.p > 0 for module in model.modules()):
        return True
    settings = base_model(model).config.to_dict()
    return any(
        isinstance(value, float) and value > 0
        for name, value in settings.items()
        if any(mark in name for mark in _MARKS)
    )
