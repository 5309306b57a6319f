"""A method's life in a script: attached to what trains, told about tasks and steps, saved and restored."""

from __future__ import annotations

import atexit
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import nn

from cl_dist.config.schema import Recipe
from cl_dist.engine.device import follow_device
from cl_dist.errors import BadInput
from cl_dist.integrate.drivers import Driver, EngineDriver, LoopDriver
from cl_dist.integrate.methods import MethodSettings, build_methods, script_recipe
from cl_dist.methods.config import Need
from cl_dist.methods.protocol import TaskPlace
from cl_dist.models.lora import LORA_A
from cl_dist.sharding import Shard, ShardView
from cl_dist.state.snapshot import load_tensors, save_tensors
from cl_dist.tasks.collate import Batch

_FOLLOWED: WeakSet[nn.Module] = WeakSet()
"""Models that a session is attached to."""


class Session:
    """One or several methods over the tasks of a script. `cl_dist.continual` makes one.

    As a context, a block is one task, unless `task` is called inside it. The same session can be entered again for the
    next task.

    Args:
        method: A name, a mapping with name and settings, or a list of them.
        settings: Settings of a single method that is given by its name.
        place: What trains: a key of `SURROUNDINGS`.
        keep_optimizer: Carry AdamW's moments from task to task. By default every task starts with fresh ones.
        seed: Seed of everything random that methods do.

    Raises:
        BadInput: A setting is wrong, or a method cannot be used here.
    """

    def __init__(
        self,
        method: MethodSettings,
        settings: Mapping[str, Any],
        place: str,
        *,
        keep_optimizer: bool = False,
        seed: int = 42,
    ) -> None:
        self._asked = (method, dict(settings))
        self._place, self._keep_optimizer, self._seed = place, keep_optimizer, seed
        self.method = build_methods(self._recipe(), place)
        """The methods, as one."""
        self._prepared = False
        self._driver: Driver | None = None
        self._carried: _State | None = None
        """The methods' state when they were detached last."""
        self._lost = False
        """Whether the script has failed with more to repeat than the task in which it did."""
        self._task: TaskPlace | None = None
        self._next: str | None = None
        self._index = -1
        self._step = 0
        self._stepping = False

    def _recipe(self, **facts: Any) -> Recipe:
        method, settings = self._asked
        return script_recipe(method, settings, seed=self._seed, keep_optimizer=self._keep_optimizer, **facts)

    # What a script calls

    @property
    def shards(self) -> ShardView:
        """This rank's pieces of the training state. Raises BadInput while the session is attached to nothing."""
        return self._attached().shards

    @property
    def tasks_trained(self) -> int:
        """How many tasks have ended."""
        return self._index + (self._task is None)

    def task(self, name: str) -> None:
        """End the current task, if one has begun, and begin `name` (collective).

        Before a `with` block or a Trainer's `train()`, this only names the task that it will be.
        """
        if self._driver is None:
            self._next = name
            return
        self.end_task()
        self.begin_task(name)

    def save(self, folder: str | Path) -> None:
        """Save the methods' state between two steps, next to what the script itself saves (collective).

        Raises:
            ClDistError: The disk is full; an older state is intact.
        """
        shards = self._attached().shards
        self.method.before_save()
        name = None if self._task is None else self._task.name
        state = {"index": self._index, "task": name, "step": self._step, "method": self.method.state_dict()}
        save_tensors(Path(folder), self.method.tensors(), state, replicated=shards.replicated)

    def load(self, folder: str | Path) -> None:
        """Restore what `save` wrote, on any number of ranks, once the script has restored model and optimiser.

        Collective. Within a task, the script goes on with that task: no call of `task` follows.

        Raises:
            CheckpointDamaged: A file is missing or differs from what was written; nothing has changed.
        """
        self._attached()
        # Once to know the task, whose beginning comes first, and once for the tensors.
        state = load_tensors(Path(folder), {})
        self._index, self._task = int(state["index"]), None
        if state["task"] is not None:
            self._index -= 1
            self.begin_task(state["task"], fresh=False)
        load_tensors(Path(folder), self.method.tensors(), self.method.later_tensors)
        self.method.tensors_loaded()
        self.method.load_state_dict(state["method"])
        self._step, self._lost = int(state["step"]), False

    # What drives it

    def prepare(self, model: nn.Module) -> None:
        """Let the methods prepare the model, before its optimiser exists where one of them needs that; once."""
        if not self._prepared:
            self._prepared = True
            self.method.prepare_model(model, self._seed)

    def attach(self, driver: Driver) -> None:
        """Attach the methods to what trains from now on, with the state that they had before (collective)."""
        module = driver.module
        if module in _FOLLOWED:
            raise BadInput(
                "cl_dist.continual: another session is attached to this model; allowed: one at a time, with several "
                "methods as method=[...]"
            )
        follow_device(next(module.parameters()).device)
        self.prepare(module)
        adapters = any(LORA_A in name for name, _ in module.named_parameters())
        recipe = self._recipe(stage=driver.stage, accumulation=driver.accumulation, adapters=adapters)
        try:
            driver.start()
            self.method.attach(module, driver.shards, recipe.train)
            self.method.after_trials(driver.try_out())
            driver.ready()
        except BaseException:
            driver.stop()
            raise
        self._driver = driver
        _FOLLOWED.add(module)
        if self._carried is not None:
            self._put_back(self._carried)

    def _put_back(self, state: _State) -> None:
        """Give the methods the state that they had in another engine, or another Trainer, around the same model."""
        changes_parts = any(Need.START in each.config.needs for each in self.method.methods)
        if not changes_parts and _trained(self.shards) != state.trained:
            raise BadInput(
                "cl_dist.continual: other parameters are trained than in the task before, so that the method's state "
                "does not fit; allowed: the same model, with the same requires_grad"
            )
        for quantity, shards in self.method.tensors().items():
            for name, shard in shards.items():
                before = state.tensors.get(quantity, {}).get(name)
                if before is not None:  # a parameter that this task freezes has its value in the model
                    shard.data.copy_(before.data)
        self.method.tensors_loaded()
        self.method.load_state_dict(state.values)

    def detach(self) -> None:
        """Take the methods off what trained, and remember their state (collective)."""
        if self._driver is None:
            return
        self.method.before_save()
        kept = {
            quantity: {name: Shard(shard.start, shard.data.clone()) for name, shard in shards.items()}
            for quantity, shards in self.method.tensors().items()
        }
        self._carried = _State(self._index, self.method.state_dict(), kept, _trained(self.shards))
        self.abandon()

    def abandon(self) -> None:
        """Remove all hooks, without collectives: the script has failed, or is over. A task that has not ended can be
        repeated.
        """
        if self._task is not None:
            done = -1 if self._carried is None else self._carried.done
            self._lost = self._lost or self._index > done + 1
            self._index, self._task = done, None
        if self._driver is not None:
            self.method.detach()
            self._driver.stop()
            _FOLLOWED.discard(self._driver.module)
            self._driver = None

    def begin_task(self, name: str | None = None, steps: int = 0, *, fresh: bool = True) -> None:
        """Begin the next task (collective).

        Args:
            name: Its name; None: `task N`.
            steps: Optimiser steps of the task, as far as known.
            fresh: Whether it begins at its first step, rather than where a saved state ends.
        """
        driver = self._attached()
        if self._lost and fresh:
            raise BadInput(
                "cl_dist.continual: the block ended with an error after several tasks, and the method's state with it; "
                "allowed: session.load(...) of a saved state, or a new session from the start"
            )
        self._index += 1
        if self.method.prepare_task(self._index):
            raise BadInput(f"cl_dist.continual: a method {Need.REBUILD.value}; allowed: other methods")
        if fresh and self._index > 0 and not self._keep_optimizer:
            driver.shards.reset_optimizer()
        self._task = TaskPlace(self._index, name or self._next or f"task {self._index + 1}", steps)
        self._next = None
        self._step, self._stepping = 0, False
        self.method.follow(self._task.name)
        self.method.before_task(self._task)

    def prepare_next(self) -> bool:
        """Get the model ready for the next task; return whether other parameters are trained in it."""
        return self.method.prepare_task(self._index + 1)

    def end_task(self) -> None:
        """The current task's last step is done: methods fuse, score or measure (collective)."""
        if self._task is None:
            return
        if self._stepping:
            raise BadInput(
                f"cl_dist.continual: {self._task.name} ends between a backward pass and optimizer.step(); allowed: "
                "after a step"
            )
        self.method.after_task(self._task)
        self._task = None

    def _attached(self) -> Driver:
        if self._driver is None:
            raise BadInput("cl_dist.continual: the session is attached to nothing yet; allowed: inside its with block")
        return self._driver

    # Moments of a step, called by the driver

    def before_trial(self, batch: Batch) -> None:
        """See `Listener`."""
        self.method.before_trial(batch.token_masks)

    def before_forward(self, batch: Batch) -> None:
        """See `Listener`."""
        if self._task is None:
            self.begin_task()
        if not self._stepping:
            self._stepping = True
            self.method.before_step(self._step)
        self.method.before_forward(self._step, batch)

    def before_backward(self) -> None:
        """See `Listener`."""
        loss = torch.zeros(())
        if self.method.before_backward(loss) is not loss:
            raise BadInput(
                "cl_dist.continual: a method changes the loss before backward, but here the script's own backward is "
                "under way; allowed: methods that do not"
            )

    def before_update(self) -> None:
        """See `Listener`."""
        self.method.before_update()

    def after_update(self) -> None:
        """See `Listener`."""
        self.method.after_update()
        self._step += 1
        self._stepping = False


class _State(NamedTuple):
    """The methods' state between two engines."""

    done: int
    """Position of the last task that had ended."""
    values: dict[str, Any]
    """`Method.state_dict`."""
    tensors: dict[str, dict[str, Shard]]
    """Copies of `Method.tensors`."""
    trained: dict[str, torch.Size]
    """Shapes of the trained parameters."""


def _trained(shards: ShardView) -> dict[str, torch.Size]:
    return {name: shards.shape(name) for name in shards.names}


class LoopSession(Session):
    """A session of a script with a loop of its own, whose model and optimiser exist already: see `Session`.

    Args:
        model: A DeepSpeed engine, or a model of transformers, perhaps in a DistributedDataParallel.
        optimizer: The model's optimiser; None for a DeepSpeed engine, which has its own.
        accumulation: Backward passes per optimiser step, where the loop itself counts them; None: 1, or what
            accelerate's plugin says.
    """

    def __init__(
        self,
        model: Any,
        optimizer: Any,
        method: MethodSettings,
        settings: Mapping[str, Any],
        *,
        accumulation: int | None = None,
        **options: Any,
    ) -> None:
        self._is_engine = _is_engine(model)
        if self._is_engine and accumulation is not None:
            raise BadInput(
                "cl_dist.continual: gradient_accumulation is not read, because the DeepSpeed engine has its own; "
                "allowed: without it"
            )
        if not self._is_engine and optimizer is None:
            raise BadInput(
                f"cl_dist.continual: a {type(model).__name__} has no optimiser; allowed: a Trainer, a DeepSpeed "
                "engine, or continual(model, optimizer, ...)"
            )
        wrapped = type(optimizer).__module__.startswith("accelerate.")
        place = "accelerate" if wrapped else "DeepSpeed, ZeRO 0-3" if self._is_engine else "PyTorch, DDP, FSDP2"
        super().__init__(method, settings, place, **options)
        self._model, self._optimizer = model, optimizer
        plugin = optimizer.gradient_state.num_steps if wrapped and not self._is_engine else 1
        self._accumulation = plugin if accumulation is None else accumulation

    def __enter__(self) -> LoopSession:
        """Attach the methods to model and optimiser."""
        start_group()
        if self._is_engine:
            self.attach(EngineDriver(self._model, self))
        else:
            self.attach(LoopDriver(self._model, self._optimizer, self, self._accumulation))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the current task and detach; after an error, only remove the hooks."""
        if kind is None:
            try:
                self.end_task()
                self.detach()
                return
            finally:
                self.abandon()
        self.abandon()


def _is_engine(model: Any) -> bool:
    return any(cls.__name__ == "DeepSpeedEngine" for cls in type(model).__mro__)


def start_group() -> None:
    """Give a single process a process group of its own, which methods ask for their rank, if the script has none."""
    if not torch.distributed.is_initialized():
        if (ranks := int(os.environ.get("WORLD_SIZE") or 1)) > 1:
            raise BadInput(
                f"cl_dist.continual: {ranks} ranks have been started, but this one has not joined them; allowed: "
                "torch.distributed.init_process_group (or deepspeed's) first"
            )
        store = torch.distributed.HashStore()  # type: ignore[attr-defined]
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        atexit.register(lambda: torch.distributed.is_initialized() and torch.distributed.destroy_process_group())
