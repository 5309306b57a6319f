"""Notices a model's passes in somebody else's training loop: where they begin and end, whoever calls them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.autograd import Variable

from cl_dist.errors import BadInput
from cl_dist.models.structure import base_model
from cl_dist.tasks.collate import Batch
from cl_dist.tasks.types import IGNORE


class Passes:
    """Calls back at each training pass of a model. Evaluation passes go unnoticed.

    A backward pass is noticed when the gradient of one of the model's outputs is there, so before it reaches any of the
    model's layers; its end when all gradients are accumulated, and reduced by DDP.

    Args:
        module: The model itself, not what wraps it.
        forward: Called before each forward pass, with its inputs.
        backward: Called at the beginning of each backward pass. It may use collectives.
        done: Called when a backward pass has ended; None: nobody waits for it.
    """

    def __init__(
        self,
        module: nn.Module,
        forward: Callable[[Batch], None],
        backward: Callable[[], None],
        done: Callable[[], None] | None = None,
    ) -> None:
        self._forward, self._backward, self._done = forward, backward, done
        self._current = -1
        """The backward pass that has been noticed last: torch numbers them."""
        self._base = base_model(module)
        self._handles = [
            module.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            module.register_forward_hook(self._after_forward),
        ]

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not module.training or recomputes():
            return
        if not torch.is_grad_enabled():
            raise BadInput(
                "cl_dist.continual: the script runs the model in training mode without gradients; allowed: call "
                "model.eval() around passes that are not trained on"
            )
        positional = inspect.signature(type(self._base).forward).bind_partial(module, *args).arguments if args else {}
        self._forward(batch_of({**positional, **kwargs}, answer_apart=self._base.config.is_encoder_decoder))

    def _after_forward(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if module.training and torch.is_grad_enabled() and not recomputes():
            for tensor in _tensors(output):
                if tensor.requires_grad:
                    tensor.register_hook(self._notice)

    def _notice(self, gradient: torch.Tensor) -> None:
        """The first call in a backward pass is its beginning; a pass may come through several outputs."""
        this = torch._C._current_graph_task_id()
        if this == self._current:
            return
        self._current = this
        if self._done is not None:
            Variable._execution_engine.queue_callback(self._end)
        self._backward()

    def _end(self) -> None:
        # DDP ends its own reduction in such a callback too, which it has asked for later than this one, but before the
        # pass was over. Asking again puts this one last.
        assert self._done is not None, "the callback is there for it alone"
        Variable._execution_engine.queue_callback(self._done)


def recomputes() -> bool:
    """Whether this is inside a backward pass, where checkpointing runs forward passes again."""
    return torch._C._current_graph_task_id() != -1


def batch_of(inputs: Mapping[str, Any], answer_apart: bool) -> Batch:
    """What methods may know about a micro-batch: which of its tokens are real. The script computes the loss itself.

    Args:
        inputs: The forward's arguments by name. Without `attention_mask`, all tokens are real.
        answer_apart: Whether a decoder reads the answer, and an encoder the rest.

    Raises:
        BadInput: It cannot be told which tokens are real.
    """
    ids = inputs.get("input_ids")
    if ids is None:
        ids = inputs.get("inputs_embeds")
    if ids is None:
        raise BadInput(
            "cl_dist.continual: the model is called with neither input_ids nor inputs_embeds, so that its tokens are "
            "not known; allowed: models of transformers, called with one of them"
        )
    masks = {"input": _real(inputs.get("attention_mask"), ids, "attention_mask")}
    if answer_apart:
        masks["target"] = _answer(inputs)
    empty = ids.new_empty(0, dtype=torch.int64)
    return Batch(inputs={}, labels=empty, token_masks=masks, targets=0, tokens=0, indices=[])


def _answer(inputs: Mapping[str, Any]) -> torch.Tensor:
    """Which tokens that an encoder-decoder's decoder reads are real."""
    labels: torch.Tensor | None = inputs.get("labels")
    mask: torch.Tensor | None = inputs.get("decoder_attention_mask")
    if labels is not None:
        return labels != IGNORE
    if mask is not None:
        return mask.bool()
    raise BadInput(
        "cl_dist.continual: the model's decoder is called with neither labels nor decoder_attention_mask, so that "
        "padding cannot be told from the answer; allowed: model(..., labels=...), also if the loss is your own"
    )


def _real(mask: torch.Tensor | None, ids: torch.Tensor, name: str) -> torch.Tensor:
    if mask is None:
        return torch.ones(ids.shape[:2], dtype=torch.bool, device=ids.device)
    if mask.shape != ids.shape[:2]:
        raise BadInput(
            f"cl_dist.continual: {name} has the shape {tuple(mask.shape)}, so it does not say which tokens are real; "
            f"allowed: {tuple(ids.shape[:2])}, one entry a token"
        )
    return mask.bool()


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    """The tensors in what a model returns, itself a tensor, a mapping or a sequence."""
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from _tensors(value)
