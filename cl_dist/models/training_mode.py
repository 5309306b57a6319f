"""How a model behaves while it trains, is measured or is saved: checkpointing, dropout, key-value cache, modes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import PreTrainedConfig

from cl_dist.errors import BadInput
from cl_dist.models.structure import base_model

_DROPOUT_NAMES = ("dropout", "pdrop")
"""What the names of dropout probabilities contain in transformers' configurations."""

_LOADED_CACHE: WeakKeyDictionary[nn.Module, list[bool | None]] = WeakKeyDictionary()
"""`use_cache` of each model's configurations, as loaded; None where one did not set it."""


def enable_activation_checkpointing(model: nn.Module) -> None:
    """Make every transformer block of `model` (with or without adapters) recompute its activations in backward.

    Uses the non-reentrant form, which needs no input that requires a gradient, so that blocks behind frozen embeddings
    work too.

    Raises:
        BadInput: The architecture does not support it.
    """
    base = base_model(model)
    if not base.supports_gradient_checkpointing:
        raise BadInput(f"train.activation_checkpointing: {type(base).__name__} does not support it; allowed is false")
    # transformers 5.23 renamed the method and its argument.
    if hasattr(base, "activation_checkpointing_enable"):
        base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    else:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


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
    """Put `model` in evaluation mode inside the block, but keep its memory as low as in training.

    A transformers block recomputes its activations only while its own `training` flag is set. So blocks with
    checkpointing keep the flag, and their parts, dropout among them, lose it. Afterwards all modules take the mode that
    `model` itself had.
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


def has_dropout(model: nn.Module) -> bool:
    """Whether any dropout has a probability above zero: in the model's modules, its adapters or its attention."""
    if any(isinstance(module, _DropoutNd) and module.p > 0 for module in model.modules()):
        return True
    # Attention applies its dropout as a function, which only the configuration shows.
    settings = base_model(model).config.to_dict()
    return any(
        isinstance(value, float) and value > 0
        for name, value in settings.items()
        if any(part in name for part in _DROPOUT_NAMES)
    )


def layerdrop(model: nn.Module) -> dict[str, float]:
    """Return the active settings of the configuration that drop whole layers at random in training."""
    settings = base_model(model).config.to_dict()
    return {name: value for name, value in settings.items() if "layerdrop" in name and value}


def switch_cache_off(model: nn.Module) -> None:
    """Stop forward passes from keeping keys and values unless they ask for it."""
    base = base_model(model)
    _LOADED_CACHE.setdefault(base, [getattr(config, "use_cache", None) for config in _configurations(base)])
    for config in _configurations(base):
        config.use_cache = False


@contextmanager
def cache_as_loaded(model: nn.Module) -> Iterator[None]:
    """Restore the loaded `use_cache` inside the block, so that a saved model keeps its original setting."""
    base = base_model(model)
    if base not in _LOADED_CACHE:
        yield
        return
    for config, loaded in zip(_configurations(base), _LOADED_CACHE[base], strict=True):
        if loaded is None:
            del config.use_cache
        else:
            config.use_cache = loaded
    try:
        yield
    finally:
        switch_cache_off(base)


def _configurations(base: nn.Module) -> list[PreTrainedConfig]:
    """List the model's configuration, and the text part's of a multimodal model."""
    config = base_model(base).config
    text = config.get_text_config()
    return [config] if text is config else [config, text]
