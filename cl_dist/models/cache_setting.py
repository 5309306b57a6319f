"""Whether a model keeps keys and values for generation: not while it trains, but what is written says what it said."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from torch import nn
from transformers import PreTrainedConfig

from cl_dist.models.structure import base_model

_LOADED: WeakKeyDictionary[nn.Module, list[bool | None]] = WeakKeyDictionary()
"""What the configurations of a model said before its cache was switched off."""


def switch_cache_off(model: nn.Module) -> None:
    """Let forward passes that do not ask for it keep no keys and values."""
    base = base_model(model)
    _LOADED.setdefault(base, [getattr(config, "use_cache", None) for config in _configurations(base)])
    for config in _configurations(base):
        config.use_cache = False


@contextmanager
def cache_as_loaded(model: nn.Module) -> Iterator[None]:
    """Inside, the model's configuration says of the cache what it said when it was loaded."""
    base = base_model(model)
    if base not in _LOADED:
        yield
        return
    for config, loaded in zip(_configurations(base), _LOADED[base], strict=True):
        if loaded is None:
            del config.use_cache
        else:
            config.use_cache = loaded
    try:
        yield
    finally:
        switch_cache_off(base)


def _configurations(base: nn.Module) -> list[PreTrainedConfig]:
    """The model's configuration, and that of the text part of a multimodal one."""
    config = base_model(base).config
    text = config.get_text_config()
    return [config] if text is config else [config, text]
