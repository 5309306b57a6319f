"""A model that is measured, not trained: without dropout, but as sparing of memory as in training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def kept_capacities(model: nn.Module) -> Iterator[None]:
    """Restore how many tokens each expert takes: outside training, NLLB-MoE's routers overwrite it with what the
    evaluation allows, and training would continue with that.
    """
    routers = [module for module in model.modules() if "expert_capacity" in vars(module)]
    before = [(router, vars(router)["expert_capacity"]) for router in routers]
    try:
        yield
    finally:
        for router, capacity in before:
            router.expert_capacity = capacity


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Inside, `model` is in evaluation mode; afterwards all of it is in the mode that it was in as a whole.

    A block of transformers with activation checkpointing recomputes its activations only while it says that it trains.
    It goes on saying so, its parts (dropout among them) do not.
    """
    training = model.training
    model.eval()
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False) is True:
            module.training = True
    try:
        with kept_capacities(model):
            yield
    finally:
        model.train(training)
