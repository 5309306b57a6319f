"""What trains in a script: a DeepSpeed engine, or a model with an optimiser of torch, with or without DDP.

A driver finds the places in the script's own loop at which a method acts, and calls the `Listener` there. What a method
cannot allow is refused by name, before the first step where possible.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from peft import PeftModel
from torch import nn
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DataParallel, DistributedDataParallel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from cl_dist.config.objectives import ObjectiveName
from cl_dist.engine.engine import loss_sum
from cl_dist.engine.trial import counters_kept, failures_as_bad_input, idle_parameters, trial_batches
from cl_dist.errors import BadInput, ClDistError
from cl_dist.integrate.passes import Passes, recomputes
from cl_dist.models.structure import base_model
from cl_dist.sharding import ShardView, TorchState, check_deepspeed
from cl_dist.sharding.layouts import reshard
from cl_dist.sharding.model import release_gathered
from cl_dist.sharding.view import is_fully_sharded
from cl_dist.tasks.collate import Batch
from cl_dist.tasks.objectives import OBJECTIVES

_CLASSES: dict[ObjectiveName, Any] = {
    "seq2seq_lm": AutoModelForSeq2SeqLM,
    "classification": AutoModelForSequenceClassification,
    "causal_lm": AutoModelForCausalLM,
    "masked_lm": AutoModelForMaskedLM,
}
_OPTIMISERS = ("AdamW", "Adam", "FusedAdam", "DeepSpeedCPUAdam")
"""Names of the optimisers' classes, of torch and of DeepSpeed, that keep the moments `exp_avg` and `exp_avg_sq`."""


class Listener(Protocol):
    """What a driver calls, on all ranks alike."""

    def before_trial(self, batch: Batch) -> None:
        """A trial batch is about to run through the model."""

    def before_forward(self, batch: Batch) -> None:
        """A micro-batch is about to run through the model in training."""

    def before_backward(self) -> None:
        """A micro-batch's backward pass begins."""

    def before_update(self) -> None:
        """The step's gradients are complete."""

    def after_update(self) -> None:
        """The optimiser has stepped."""


class Driver(ABC):
    """One model in training.

    Args:
        module: The model itself.
        listener: Called at the moments of every step.
    """

    shards: ShardView
    """Its training state."""
    stage: int = 0
    """ZeRO stage; 0 without DeepSpeed."""
    accumulation: int
    """Micro-batches per optimiser step; the last step of an epoch may have fewer."""

    def __init__(self, module: nn.Module, listener: Listener) -> None:
        self.module, self._listener = module, listener
        self._undo: list[Callable[[], None]] = []
        """Takes back what was changed, last change first."""
        _check_model(module)

    @abstractmethod
    def start(self) -> None:
        """Hook the loop in front of the method's own hooks. Call `ready` when those are there too."""

    @abstractmethod
    def try_out(self) -> frozenset[str]:
        """Run two tiny batches, as `TrainingEngine` does; nothing changes (collective).

        Returns:
            Names of the trainable parameters without a gradient.
        """

    def ready(self) -> None:  # noqa: B027 - most have no more to do
        """Hook the loop behind the method's own hooks."""

    def stop(self) -> None:
        """Remove all hooks."""
        while self._undo:
            self._undo.pop()()

    def _trial_batches(self) -> list[Batch]:
        device = next(self.module.parameters()).device
        return [batch.to(device) for batch in trial_batches(self.module, _objective(self.module))]

    def _run_trial(self, run: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        self._listener.before_trial(batch)
        return OBJECTIVES[_objective(self.module)].forward(run, batch, keeps_logits=False)

    def _check_finite(self) -> None:
        """Raise ClDistError unless the reduced gradient is finite on all ranks (collective); on all ranks alike."""
        bad = (~self.shards.gradient_norm().isfinite()).float().to(next(self.module.parameters()).device)
        torch.distributed.all_reduce(bad)
        if bad.item():
            names = [self.shards.non_finite_gradient()] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(names, names[0])
            name = next((found for found in names if found is not None), None)
            of = "the gradient norm" if name is None else f"the gradient of {name}"
            raise ClDistError(
                f"cl_dist.continual: {of} is not finite in this step, and no weight has changed; a method must not "
                "measure it: lower the learning rate, or leave the samples out"
            )


class EngineDriver(Driver):
    """A DeepSpeed engine: the method acts between reduction and clipping, in the engine's own step.

    Args:
        engine: A `deepspeed.DeepSpeedEngine` of stage 0 to 3.
        listener: Called at the moments of every step.
    """

    def __init__(self, engine: Any, listener: Listener) -> None:
        super().__init__(engine.module, listener)
        if problems := check_deepspeed():
            raise ClDistError("; ".join(problems))
        if type(engine).__name__ != "DeepSpeedEngine":
            raise _refusal(f"the engine is a {type(engine).__name__}", "deepspeed.DeepSpeedEngine, without pipelines")
        if engine.fp16_enabled() or engine.torch_autocast_z0_gradscaler:
            raise _refusal("the engine scales the loss (fp16)", "bf16, or float32")
        self._engine = engine
        self.stage = engine.zero_optimization_stage()
        self.shards = ShardView(engine)
        _check_optimizer(self.shards.layout.inner)
        _check_gradient_hooks(self.module)
        managed = engine.managed_gradient_accumulation()
        self.accumulation = engine.gradient_accumulation_steps() if managed else 2  # unknown: as if there were several
        self._trying = False
        self._idle = frozenset[str]()

    def start(self) -> None:
        """See `Driver`."""
        passes = Passes(self.module, self._listener.before_forward, self._listener.before_backward)
        listener = self._listener
        undo = self.shards.on_boundary(listener.before_update, listener.after_update, self._allows)
        self._undo += [passes.remove, undo]

    def _allows(self) -> bool:
        """Whether to apply the reduced gradient, which must be finite; a trial only reads it."""
        if self._trying:
            self._idle = idle_parameters(self.shards)
        else:
            self._check_finite()
        return not self._trying

    def try_out(self) -> frozenset[str]:
        """See `Driver`."""
        first, second = self._trial_batches()
        passes = self.accumulation if self._engine.managed_gradient_accumulation() else 1
        try:
            with counters_kept(self._engine), _as_if_new(self._engine), _trial_mode(self.module):
                self._trying = True
                for _ in range(passes):
                    self._engine.backward(loss_sum(*self._run_trial(self._engine, first)))
                    self._engine.step()
                with torch.no_grad():
                    self._run_trial(self._engine, second)
                release_gathered(self.module)
        finally:
            self._trying = False
        return self._idle


class LoopDriver(Driver):
    """A loop around a model and an optimiser of torch: `loss.backward()`, clipping, `optimizer.step()`.

    The method acts where the step's last backward pass ends, which is before clipping.

    Args:
        model: The model, or the DistributedDataParallel around it.
        optimizer: AdamW or Adam, or accelerate's wrapper around one.
        listener: Called at the moments of every step.
        accumulation: Backward passes per step; with accelerate's wrapper, accelerate says which is the last one.
    """

    def __init__(self, model: nn.Module, optimizer: Any, listener: Listener, accumulation: int) -> None:
        if isinstance(model, DataParallel):
            raise _refusal("the model is a DataParallel", "DistributedDataParallel, one process a GPU")
        module = model.module if isinstance(model, DistributedDataParallel) else model
        super().__init__(module, listener)
        world = torch.distributed.get_world_size()
        reshard(module)
        self._fully_sharded = is_fully_sharded(module)
        if world > 1 and module is model and not self._fully_sharded:
            raise _refusal(
                f"the job has {world} ranks, but the model is a {type(model).__name__}, whose gradients nobody reduces "
                "before the method sees them",
                "torch.nn.parallel.DistributedDataParallel, fully_shard, or a DeepSpeed engine",
            )
        self._ended = _accelerate_boundary(optimizer)
        if getattr(optimizer, "scaler", None) is not None:
            raise _refusal("accelerate scales the loss (mixed_precision: fp16)", "bf16, or no")
        self._optimizer: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
        _check_optimizer(self._optimizer)
        _check_gradient_hooks(module, accumulated=True)
        _check_precision(module)
        self.accumulation = accumulation
        if self._fully_sharded:
            _check_mesh(module)
        self.shards = ShardView(TorchState(module, self._optimizer, _waits_for_all(model)))
        self._passes = 0
        """Backward passes since the last step."""
        self._complete = False
        """Whether the method has seen the step's gradients."""
        self._versions: list[int] = []
        """How often each gradient had been written when the last backward pass ended, or the last step."""
        self._stepping = self._stepped = False

    def start(self) -> None:
        """See `Driver`."""
        passes = Passes(self.module, self._before_forward, self._before_backward, self._after_backward)
        handle = self._optimizer.register_step_pre_hook(self._before_step)
        self._undo += [passes.remove, handle.remove]

    def ready(self) -> None:
        """See `Driver`: the method's hooks around the optimiser's step come before this one."""
        self._undo.append(self._optimizer.register_step_post_hook(self._after_step).remove)

    def try_out(self) -> frozenset[str]:
        """See `Driver`."""
        first, second = self._trial_batches()
        with _trial_mode(self.module):
            loss = loss_sum(*self._run_trial(self.module, first))
            if self._fully_sharded:
                return self._try_backward(loss, second)
            # Unlike backward, this leaves alone what is in `.grad`, and what DDP does there.
            found = torch.autograd.grad(loss, list(self.shards.params.values()), allow_unused=True)
            with torch.no_grad():
                self._run_trial(self.module, second)
        pairs = zip(self.shards.names, found, strict=True)
        return frozenset(name for name, gradient in pairs if gradient is None or not gradient.count_nonzero())

    def _try_backward(self, loss: torch.Tensor, second: Batch) -> frozenset[str]:
        """The rest of the trial under FSDP2, whose parameters get gradients in a whole backward pass only."""
        # Not those that the module has now, in the middle of a pass: they are the gathered weights.
        before = [(param, param.grad) for param in self.shards.params.values()]
        for param, _ in before:
            param.grad = None
        loss.backward()
        idle = idle_parameters(self.shards)
        for param, gradient in before:
            param.grad = gradient
        with torch.no_grad():
            self._run_trial(self.module, second)
        self.shards.publish()
        return idle

    def _before_forward(self, batch: Batch) -> None:
        kind = next(self.module.parameters()).device.type
        if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16:
            raise _refusal("the forward pass runs under autocast in float16, which needs a scaled loss", "bfloat16")
        if self._complete:
            raise _refusal(
                f"a further pass came after the step's gradients were complete ({self._passes} backward passes)",
                f"gradient_accumulation={self._passes + 1} or more, as in the script, then optimizer.step()",
            )
        if self._stepped and not self._fully_sharded and self._gradients_written() == self._versions:
            raise _refusal("the last step's gradients are still there", "optimizer.zero_grad() after every step")
        self._stepped = False
        self._listener.before_forward(batch)

    def _before_backward(self) -> None:
        self._listener.before_backward()

    def _after_backward(self) -> None:
        self._passes += 1
        if self._passes == self.accumulation if self._ended is None else self._ended():
            self._take_gradients()
        self._versions = self._gradients_written()

    def _gradients_written(self) -> list[int]:
        gradients = (param.grad for param in self.shards.params.values())
        return [gradient._version for gradient in gradients if gradient is not None]

    def _take_gradients(self) -> None:
        self._check_finite()
        self._listener.before_update()
        self._complete = True

    def _before_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # The first argument is the optimiser itself; accelerate passes None for the closure.
        if any(closure is not None for closure in (*args[1:], kwargs.get("closure"))):
            raise _refusal("optimizer.step gets a closure", "backward first, then optimizer.step()")
        if _inside_scaler():
            raise _refusal("a GradScaler steps the optimiser, with gradients of a scaled loss", "bfloat16 or float32")
        if self._passes == 0:
            if any(param.grad is not None for param in self.shards.params.values()):
                raise _refusal(
                    "the optimiser steps with gradients that no training pass of the model made",
                    "loss.backward() on what the model returns in training mode",
                )
            return
        if not self._complete:
            # A step with fewer passes than usual, at an epoch's end. It was not known to be the last one.
            # Nobody counts how often a DTensor is written.
            if self._fully_sharded or self._versions != self._gradients_written():
                raise _refusal(
                    f"gradients were edited (clipped?) after {self._passes} of {self.accumulation} backward passes, "
                    "before the method could see them",
                    "steps of gradient_accumulation passes, or no clipping in shorter ones",
                )
            self._take_gradients()
        self._stepping = True

    def _after_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._stepping:
            self._listener.after_update()
            self._passes, self._complete, self._stepping = 0, False, False
            self._stepped, self._versions = True, self._gradients_written()


def _refusal(problem: str, allowed: str) -> BadInput:
    return BadInput(f"cl_dist.continual: {problem}; allowed: {allowed}")


def _objective(module: nn.Module) -> ObjectiveName:
    """What a model of transformers is trained to do, by its class."""
    base = base_model(module)
    kind = type(base.config)
    for objective, auto in _CLASSES.items():
        classes = auto._model_mapping.get(kind, ())
        if isinstance(base, classes):
            return objective
    raise _refusal(
        f"the model is a {type(base).__name__}", "causal, masked and encoder-decoder language models, and classifiers"
    )


def _check_model(module: nn.Module) -> None:
    """Refuse a model that is compiled or not one of transformers."""
    for name, part in module.named_modules():
        if type(part).__name__ == "OptimizedModule" or part._compiled_call_impl is not None:
            raise _refusal(
                f"{name or 'the model'} is compiled (torch.compile), and the rows of a step are chosen anew in every "
                "backward pass",
                "the model as it is",
            )
    base: Any = module.get_base_model() if isinstance(module, PeftModel) else module
    if not isinstance(base, PreTrainedModel):
        raise _refusal(f"the model is a {type(base).__name__}", "a PreTrainedModel of transformers, or a PeftModel")
    if not any(param.requires_grad for param in module.parameters()):
        raise _refusal("none of the model's parameters is trained", "at least one with requires_grad")
    _objective(module)


def _check_optimizer(optimizer: Any) -> None:
    name = type(optimizer).__name__
    if not isinstance(optimizer, torch.optim.Optimizer) or name not in _OPTIMISERS:
        raise _refusal(
            f"the optimiser is a {name}, whose state or step the methods do not know", ", ".join(_OPTIMISERS)
        )
    if any(group.get("amsgrad") for group in optimizer.param_groups):
        raise _refusal("the optimiser has amsgrad, a third moment", "amsgrad=False")


def _check_gradient_hooks(module: nn.Module, accumulated: bool = False) -> None:
    """Refuse hooks that edit gradients besides the method. Those of `accumulated` gradients may be DeepSpeed's own."""
    for name, param in module.named_parameters():
        hooks: Any = param._backward_hooks
        later: Any = getattr(param, "_post_accumulate_grad_hooks", None) if accumulated else None
        if hooks or later:
            raise _refusal(
                f"a hook on {name} edits its gradient or steps in backward, besides the method",
                "no hooks on parameters",
            )


def _check_precision(module: nn.Module) -> None:
    for name, param in module.named_parameters():
        if param.requires_grad and param.dtype != torch.float32:
            raise _refusal(
                f"{name} is trained in {str(param.dtype).removeprefix('torch.')}, without a float32 master",
                "float32 parameters (with autocast in bfloat16), or DeepSpeed with bf16",
            )


def _check_mesh(module: nn.Module) -> None:
    """Refuse FSDP2 on anything but one row of ranks, and parameters that it leaves out."""
    for name, param in module.named_parameters():
        cut = isinstance(param, DTensor) and param.device_mesh.ndim == 1 and param.placements == (Shard(0),)
        if not cut:
            raise _refusal(
                f"{name} is not cut along its first dimension between all ranks, as the others are",
                "fully_shard on the whole model, on a mesh with one dimension",
            )


def _waits_for_all(model: nn.Module) -> bool:
    """Whether the model is in a DistributedDataParallel that reduces nothing until every gradient is there."""
    if not isinstance(model, DistributedDataParallel):
        return False
    return bool(model.static_graph or not model.find_unused_parameters)


def _accelerate_boundary(optimizer: Any) -> Callable[[], bool] | None:
    """With an optimiser that accelerate has prepared, whether the current pass is its step's last one; else None."""
    state = getattr(optimizer, "gradient_state", None)
    return None if state is None else lambda: bool(state.sync_gradients)


def _inside_scaler() -> bool:
    """Whether a torch.amp.GradScaler is calling."""
    frame = sys._getframe()
    while (caller := frame.f_back) is not None:
        frame = caller
        if frame.f_code.co_filename.endswith(("amp/grad_scaler.py", "amp\\grad_scaler.py")):
            return True
    return False


@contextmanager
def _trial_mode(module: nn.Module) -> Iterator[None]:
    """No dropout, no moved random numbers, errors as bad input; afterwards every part has the mode that it had."""
    assert not recomputes()
    modes = [(part, part.training) for part in module.modules()]
    device = next(module.parameters()).device
    module.eval()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []), failures_as_bad_input():
            yield
    finally:
        for part, training in modes:
            part.training = training


@contextmanager
def _as_if_new(engine: Any) -> Iterator[None]:
    """Let a DeepSpeed engine take one whole step without its learning rate scheduler; afterwards it is as before.

    It may be in the middle of an epoch, and accelerate may have told it which passes end a step.
    """
    names = ("lr_scheduler", "_is_gradient_accumulation_boundary", "micro_steps")
    before = {name: getattr(engine, name) for name in names}
    engine.lr_scheduler, engine._is_gradient_accumulation_boundary, engine.micro_steps = None, None, 0
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(engine, name, value)
