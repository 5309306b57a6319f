"""Lets modules of a model rest: their parameters take part in the forward pass, but get no gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

_CHECKPOINT = "_gradient_checkpointing_func"
"""How transformers' blocks call what recomputes their activations."""


class Rest:
    """Modules whose parameters backward computes nothing for, until `end`. Gradients flow through them all the same.

    A parameter does not require a gradient while its module's forward runs, also when it runs again in backward to
    recompute activations, and does at all other times: DeepSpeed finds the parameters as it has prepared them.

    Args:
        modules: Modules of which none contains another, with all that is in them.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._handles: list[RemovableHandle] = []
        self._checkpoints: list[tuple[nn.Module, Any]] = []
        for module in modules:
            self._switch(module, [parameter for parameter in module.parameters() if parameter.requires_grad])

    def _switch(self, module: nn.Module, trained: Sequence[nn.Parameter]) -> None:
        def enter(*_: Any) -> None:
            for parameter in trained:
                parameter.requires_grad_(False)

        def leave(*_: Any) -> None:
            for parameter in trained:
                parameter.requires_grad_(True)

        self._handles.append(module.register_forward_pre_hook(enter))
        self._handles.append(module.register_forward_hook(leave, always_call=True))
        # A block's recomputation begins below its hooks.
        for part in module.modules():
            if _CHECKPOINT in vars(part):
                self._checkpoints.append((part, vars(part)[_CHECKPOINT]))
                setattr(part, _CHECKPOINT, _resting_checkpoint(vars(part)[_CHECKPOINT], trained))

    def end(self) -> None:
        """Restore the modules."""
        for handle in self._handles:
            handle.remove()
        for part, checkpoint in self._checkpoints:
            setattr(part, _CHECKPOINT, checkpoint)
        self._checkpoints.clear()


def _resting_checkpoint(checkpoint: Callable[..., Any], trained: Sequence[nn.Parameter]) -> Callable[..., Any]:
    def call(run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        def resting(*inputs: Any, **more: Any) -> Any:
            with _without_gradients(trained):
                return run(*inputs, **more)

        return checkpoint(resting, *args, **kwargs)

    return call


@contextmanager
def _without_gradients(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    before = [parameter.requires_grad for parameter in parameters]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, required in zip(parameters, before, strict=True):
            parameter.requires_grad_(required)
