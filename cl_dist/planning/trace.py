"""Runs micro-batches of the real model on the meta device and records what they would allocate, without any numbers.

Every tensor that an operation creates counts from its creation until it is freed, as with an allocator that wastes
nothing: activations that autograd saves, temporary tensors of forward and backward, logits and loss. Korthikanti et al.
(arXiv 2205.05198) derive such numbers by hand for one architecture: 34 s b h + 5 a s^2 b bytes for a layer in 16 bits.
Here they follow from the code that runs: any architecture, adapters, any attention, checkpointing. What a kernel
allocates inside one operation is not seen.
"""

from __future__ import annotations

import inspect
import math
import weakref
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only
from transformers.integrations import moe

from cl_dist.engine.engine import loss_sum
from cl_dist.errors import BadInput
from cl_dist.models.structure import base_model
from cl_dist.planning.ranks import RankView
from cl_dist.planning.setup import Setup
from cl_dist.planning.shape import ModelShape
from cl_dist.sharding.gathers import GatherSchedule
from cl_dist.tasks.collate import Batch, collate
from cl_dist.tasks.objectives import OBJECTIVES
from cl_dist.tasks.types import IGNORE, Encoded

META = torch.device("meta")
ACTIVATIONS, GRADIENTS, GATHERED, REDUCTION = "activations", "gradients", "gathered weights", "reduction"
BUFFERS = "communication buffers"


class Ledger:
    """Bytes that are held, by kind, and the moment at which they were most."""

    def __init__(self) -> None:
        self.held: Counter[str] = Counter()
        self.peak: Mapping[str, int] = {}
        """What was held at the peak."""
        self._most = -1

    def add(self, kind: str, size: int) -> None:
        """Hold more, or less if `size` is negative."""
        self.held[kind] += size
        total = sum(self.held.values())
        if total > self._most:
            self._most, self.peak = total, dict(self.held)

    def briefly(self, kind: str, size: int) -> None:
        """Hold something for the duration of one operation."""
        self.add(kind, size)
        self.add(kind, -size)

    def restart(self) -> None:
        """Forget the peak so far."""
        self._most = -1
        self.add(ACTIVATIONS, 0)


class Storages(TorchDispatchMode):
    """Enters the memory of every new tensor into a ledger.

    Args:
        ledger: Gets the bytes.
    """

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self._ledger = ledger
        self._kinds: dict[int, str] = {}
        self._refs: dict[int, Any] = {}

    def ignore(self, tensor: torch.Tensor) -> None:
        """Do not count this tensor's memory, because it is counted elsewhere."""
        self._refs[tensor.untyped_storage()._cdata] = None

    def call_it(self, tensor: torch.Tensor, kind: str) -> None:
        """Count this tensor's memory as another kind from now on."""
        storage = tensor.untyped_storage()
        if self._refs.get(storage._cdata) is not None:
            self._ledger.held[self._kinds[storage._cdata]] -= storage.nbytes()
            self._kinds[storage._cdata] = kind
            self._ledger.add(kind, storage.nbytes())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in tree_iter(result):
            if isinstance(each, torch.Tensor):
                self._note(each.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._refs:
            self._kinds[key] = ACTIVATIONS
            self._refs[key] = weakref.ref(storage, partial(self._freed, key, storage.nbytes()))
            self._ledger.add(ACTIVATIONS, storage.nbytes())

    def _freed(self, key: int, size: int, _: Any) -> None:
        self._ledger.add(self._kinds.pop(key), -size)
        del self._refs[key]


class Undecided(TorchFunctionMode):
    """Conditions on numbers, which meta tensors do not have, are false: masks are built as for a batch with padding."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.__bool__ and args[0].is_meta:
            return False
        return func(*args, **(kwargs or {}))


@contextmanager
def fused_attention(device: str) -> Iterator[None]:
    """Inside the block, attention saves what the fused kernels of `device` save, not what the fallback for meta tensors
    would: a probability for each pair of tokens.
    """
    functional: Any = torch.nn.functional
    original = functional.scaled_dot_product_attention
    functional.scaled_dot_product_attention = partial(_attention, device)
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = original


@contextmanager
def grouped_products() -> Iterator[None]:
    """Inside the block, a mixture's experts are multiplied by an operator of transformers that knows its shapes
    without numbers, in every precision; torch's own one refuses float32 on the meta device.
    """
    original = moe._grouped_mm
    moe._grouped_mm = _grouped_product
    try:
        yield
    finally:
        moe._grouped_mm = original


def _grouped_product(input: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
    product: torch.Tensor = torch.ops.transformers.grouped_mm_fallback(input.to(weight.dtype), weight, offs)
    return product


def _attention(
    device: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """What `scaled_dot_product_attention` does: a bool mask is converted in every call, then a fused kernel runs."""
    if enable_gqa:
        key, value = (each.repeat_interleave(query.shape[1] // each.shape[1], 1) for each in (key, value))
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.empty_like(attn_mask, dtype=query.dtype).masked_fill_(attn_mask, -math.inf)
    if device == "cpu":
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out: torch.Tensor = flash(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
        return out
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*query.shape[:-1], key.shape[-2])
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    result: torch.Tensor = efficient(query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale)[0]
    return result


class Reducer:
    """What becomes of a gradient once it is complete. This one keeps it until the step is over (stages 0 and 1).

    Args:
        ledger: Gets the bytes.
        storages: Knows the gradients' memory.
        buffers: Bytes of the bucket that DeepSpeed allocates at the first gradient (`setup_buckets`) and releases after
            backward.
    """

    def __init__(self, ledger: Ledger, storages: Storages, buffers: int) -> None:
        self.ledger, self._storages, self._buffers = ledger, storages, buffers
        self._open = False

    def take(self, param: nn.Parameter) -> None:
        """A parameter's gradient is complete."""
        if not self._open:
            self._open = True
            self.ledger.add(BUFFERS, self._buffers)
        self._handle(param)

    def end_micro_batch(self) -> None:
        """The micro-batch's backward pass is over."""
        if self._open:
            self._open = False
            self.ledger.add(BUFFERS, -self._buffers)

    def end_step(self) -> None:
        """The optimiser has stepped."""

    def _handle(self, param: nn.Parameter) -> None:
        assert param.grad is not None
        self._storages.call_it(param.grad, GRADIENTS)


class BucketReducer(Reducer):
    """Stages 2 and 3: gradients are copied into a bucket, which is reduced when it is full.

    `reduce_independent_p_g_buckets_and_remove_grads` in DeepSpeed's stage_1_and_2.py and stage3.py. A gradient larger
    than the bucket stays where it is until the next reduction.

    Args:
        ledger: Gets the bytes.
        storages: Knows the gradients' memory.
        buffers: See `Reducer`.
        bucket: Elements that the bucket holds.
        copied: Bytes per element that a reduction copies its bucket to.
        kept: Bytes that every micro-batch's first reduction allocates for what this rank keeps. They are added to those
            of the micro-batch before, and released.
    """

    def __init__(
        self, ledger: Ledger, storages: Storages, buffers: int, *, bucket: int, copied: int, kept: int
    ) -> None:
        super().__init__(ledger, storages, buffers)
        self._bucket, self._copied, self._kept = bucket, copied, kept
        self._pending: list[nn.Parameter] = []
        self._elements = 0
        self._reduced = self._accumulated = False

    def _handle(self, param: nn.Parameter) -> None:
        if self._pending and self._elements + param.numel() > self._bucket:
            self._reduce()
        self._pending.append(param)
        self._elements += param.numel()
        if param.numel() > self._bucket:
            super()._handle(param)
        else:
            param.grad = None

    def _reduce(self) -> None:
        self.ledger.briefly(REDUCTION, self._elements * self._copied if len(self._pending) > 1 else 0)
        if not self._reduced:
            self._reduced = True
            self.ledger.add(GRADIENTS, self._kept)
        for param in self._pending:
            param.grad = None
        self._pending, self._elements = [], 0

    def end_micro_batch(self) -> None:
        """Reduce what is left in the bucket."""
        if self._pending:
            self._reduce()
        if self._reduced and self._accumulated:
            self.ledger.add(GRADIENTS, -self._kept)
        self._accumulated, self._reduced = self._accumulated or self._reduced, False
        super().end_micro_batch()

    def end_step(self) -> None:
        """Release what this rank kept."""
        if self._accumulated:
            self.ledger.add(GRADIENTS, -self._kept)
        self._accumulated = False


@dataclass(frozen=True)
class StepTrace:
    """What forward and backward passes of an optimiser step allocate on one rank, and what they gather."""

    peak: Mapping[str, int]
    """Bytes by kind at the moment of the peak, in addition to weights and states: activations (with temporary tensors,
    logits and loss), gradients that are not reduced yet, gathered weights."""
    saved: int
    """Bytes of activations held at the end of a forward pass."""
    fetched: int
    """Bytes of weights gathered in a whole step (stage 3), outputs of the all-gathers."""
    fetches: int
    """Number of those all-gathers."""


def trace_step(setup: Setup, shape: ModelShape) -> StepTrace:
    """Run the micro-batches of a step on the meta device.

    From the second micro-batch on, all are alike, so at most two run. Stage 3 needs two steps before that, in which
    DeepSpeed learns the order of the modules.
    """
    batch = longest_batch(setup, shape)
    micro_batches = min(2, setup.recipe.train.gradient_accumulation)
    ledger = Ledger()
    storages = Storages(ledger)
    for tensor in (*shape.model.parameters(), *shape.model.buffers()):
        storages.ignore(tensor)
    schedule = _schedule(setup, shape, ledger)
    fetched: list[tuple[int, int]] = []
    saved = 0
    was_training = shape.model.training
    shape.model.train()
    reduction = _reduction(setup, shape)
    reducer = (BucketReducer if "bucket" in reduction else Reducer)(ledger, storages, **reduction)
    with schedule.installed() if schedule else nullcontext(), _gradients_go_to(reducer, shape.model):
        for _ in range(1 if schedule is None else 3):
            fetched.clear()
            ledger.restart()
            for _ in range(micro_batches):
                if schedule:
                    schedule.gathers.clear()
                try:
                    saved = max(saved, _micro_batch(setup, shape, batch, storages, ledger))
                except Exception as error:  # whatever a model does with numbers that are not there
                    raise BadInput(_cannot(setup, error)) from error
                reducer.end_micro_batch()
                if schedule:
                    schedule.end_micro_batch()
                    fetched.append((schedule.gathers.fetched, schedule.gathers.calls))
            for param in shape.model.parameters():
                param.grad = None
            reducer.end_step()
            if schedule:
                schedule.end_step()
    shape.model.train(was_training)
    return StepTrace(ledger.peak, saved, *_of_whole_step(fetched, setup.recipe.train.gradient_accumulation))


def _schedule(setup: Setup, shape: ModelShape, ledger: Ledger) -> GatherSchedule | None:
    """Stage 3's gathers, recorded in `ledger`; None if every rank holds the weights whole."""
    if setup.stage != 3 or setup.world == 1:
        return None
    zero = setup.deepspeed["zero_optimization"]
    return GatherSchedule(shape.model, setup.world, zero, partial(ledger.add, GATHERED))


def _of_whole_step(fetched: Sequence[tuple[int, int]], micro_batches: int) -> tuple[int, int]:
    """Bytes and calls of a step's gathers from those of its first two micro-batches; the rest are like the second."""
    first, *others = fetched or [(0, 0)]
    size, calls = others[0] if others else (0, 0)
    return first[0] + (micro_batches - 1) * size, first[1] + (micro_batches - 1) * calls


def _cannot(setup: Setup, error: Exception) -> str:
    why = " ".join(str(error).split())[:120] or type(error).__name__
    return (
        f"model.name_or_path: {setup.recipe.model.name_or_path} cannot be planned, because a training pass over it "
        f"does not work without numbers ({why})"
    )


def longest_batch(setup: Setup, shape: ModelShape) -> Batch:
    """A micro-batch of made-up tokens, as long as the recipe allows, on the CPU."""
    facts = OBJECTIVES[shape.objective].facts
    length, size = setup.tokens, setup.recipe.train.micro_batch_size
    answer = setup.predicted(shape.objective)
    if facts.answer_apart:
        samples = [Encoded(number, [1] * length, [1] * answer) for number in range(size)]
    elif facts.needs_labels:
        samples = [Encoded(number, [1] * length, [0]) for number in range(size)]
    else:
        labels = [IGNORE] * max(1, length - answer) + [1] * min(answer, length - 1)
        samples = [Encoded(number, [1] * length, labels) for number in range(size)]
    return collate(samples, shape.objective, pad_id=0, decoder_start_id=0)


def _micro_batch(setup: Setup, shape: ModelShape, batch: Batch, storages: Storages, ledger: Ledger) -> int:
    """Forward and backward, with those tensors alive that the engine's step keeps alive; returns the bytes held between
    the two.
    """

    def run(**inputs: Any) -> Any:
        return shape.model(**tree_map_only(torch.Tensor, lambda tensor: tensor.to(META), inputs))

    keeps = "logits_to_keep" in inspect.signature(base_model(shape.model).forward).parameters
    with fused_attention(setup.device), grouped_products(), storages:
        with Undecided():
            logits, labels = OBJECTIVES[shape.objective].forward(run, batch, keeps)
        total = loss_sum(logits, labels.to(META))
        saved = ledger.held[ACTIVATIONS]
        torch.autograd.backward(total)
    return saved


def trace_key(setup: Setup, shape: ModelShape) -> Hashable:
    """Set-ups of the same run with equal keys have equal traces."""
    train = setup.recipe.train
    split = (train.micro_batch_size, train.gradient_accumulation, train.activation_checkpointing)
    return setup.stage == 3, split, tuple(_reduction(setup, shape).items())


def _reduction(setup: Setup, shape: ModelShape) -> dict[str, int]:
    """What the stage does with gradients: the arguments of `Reducer`, or those of `BucketReducer`. Stages 1 and 2
    allocate their buckets anew for each backward pass.
    """
    rank = RankView(setup, shape)
    copies = 2 if rank.zero.get("overlap_comm", False) else 1
    dtype = setup.gradient_itemsize if setup.stage == 1 else setup.itemsize
    buffers = setup.bucket * dtype * copies if setup.stage in (1, 2) and not setup.whole_float32_gradients else 0
    if setup.stage < 2:
        return {"buffers": buffers}
    converted = setup.communication_itemsize if setup.communication_itemsize != setup.itemsize else 0
    kept = 0 if setup.stage == 3 else rank.step_gradients
    return {"buffers": buffers, "bucket": setup.bucket, "copied": setup.itemsize + converted, "kept": kept}


@contextmanager
def _gradients_go_to(reducer: Reducer, model: nn.Module) -> Iterator[None]:
    """Inside the block, complete gradients go to the reducer."""
    handles = [
        param.register_post_accumulate_grad_hook(reducer.take) for param in model.parameters() if param.requires_grad
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
