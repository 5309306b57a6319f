"""The methods in transformers' Trainer and its subclasses, such as TRL's SFTTrainer: one `train()` is one task."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from types import TracebackType
from typing import Any
from weakref import ReferenceType, ref

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from cl_dist.errors import BadInput
from cl_dist.integrate.drivers import Driver, EngineDriver, LoopDriver
from cl_dist.integrate.methods import MethodSettings
from cl_dist.integrate.session import LoopSession, Session, start_group
from cl_dist.sharding import remove_leftovers

STATE_FOLDER = "cl_dist"
"""Where the methods' state lies in a Trainer's checkpoint."""


class ContinualCallback(TrainerCallback):
    """Brings methods into a Trainer: `Trainer(..., callbacks=[ContinualCallback(method="migu", threshold=0.7)])`.

    Every `train()` is a task, and every checkpoint of the Trainer has the methods' state in it, from which
    `train(resume_from_checkpoint=...)` goes on. Evaluation is left alone. For a Trainer per task, pass the same
    callback to each of them, with the same model. (accelerate allows one Trainer with DeepSpeed in a process.)

    Args:
        method: A name, a mapping with name and settings, or a list of them.
        keep_optimizer: Carry AdamW's moments from task to task. By default every task starts with fresh ones.
        seed: Seed of everything random that methods do.
        **settings: Settings of a single method that is given by its name.

    Raises:
        BadInput: A setting is wrong, or a method cannot be used in a Trainer.
    """

    def __init__(
        self, method: MethodSettings, *, keep_optimizer: bool = False, seed: int = 42, **settings: Any
    ) -> None:
        self.session = Session(method, settings, "Trainer, SFTTrainer", keep_optimizer=keep_optimizer, seed=seed)
        """The methods: `session.task(name)` names the next `train()`, `session.method` has them."""
        self._trainer: ReferenceType[Trainer] | None = None
        self._stale: bool | None = None
        """After a `train()` whose engine is still there: whether other parameters are trained now. Else None."""

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Check the Trainer, and prepare its model while there is no optimiser yet."""
        trainer = self._find()
        if trainer is not None:
            self.join(trainer)

    def join(self, trainer: Trainer) -> None:
        """Work in this Trainer from now on.

        Raises:
            BadInput: It trains in a way that no method can follow.
        """
        check_arguments(trainer.args)
        before = None if self._trainer is None else self._trainer()
        if before is not None and before is not trainer:
            self._renew(before)
        if before is not trainer:
            self._trainer = ref(trainer)
            trainer.train = self._renewing(trainer)  # type: ignore[method-assign]
        start_group()
        self.session.prepare(_model_of(trainer))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach the methods to what this `train()` trains, and begin or resume its task."""
        trainer = self._trainer() if self._trainer is not None else self._find()
        if trainer is None:
            raise BadInput("cl_dist.ContinualCallback: its Trainer is not known; allowed: one Trainer at a time")
        self.join(trainer)
        self.session.abandon()  # an earlier train() may have failed
        self.session.attach(_driver_of(trainer, self.session))
        if state.global_step == 0:
            self.session.begin_task(steps=state.max_steps)
            return
        folder = _resumed_from(trainer, state) / STATE_FOLDER
        if not (folder / "state.json").exists():
            raise BadInput(
                f"{folder}: the checkpoint was saved without the method's state, so the task cannot go on where it "
                "was; allowed: a checkpoint that was saved with cl_dist.ContinualCallback"
            )
        self.session.load(folder)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add the methods' state to the checkpoint."""
        trainer = self._trainer() if self._trainer is not None else None
        if trainer is not None and trainer.is_in_train:
            self.session.save(_checkpoint(trainer, state) / STATE_FOLDER)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """End the task; methods fuse now. The engine stays, so that the Trainer can save and evaluate."""
        trainer = self._trainer() if self._trainer is not None else None
        assert trainer is not None, "on_train_begin has found it"
        self.session.end_task()
        self.session.detach()
        self._stale = self.session.prepare_next()

    def _renewing(self, trainer: Trainer) -> Callable[..., Any]:
        """The Trainer's `train`, which first puts away what an earlier one has left. No callback comes early enough."""
        # Of the class, because the Trainer must not hold itself.
        train, whose = type(trainer).train, ref(trainer)

        @wraps(train)
        def renewed(*args: Any, **kwargs: Any) -> Any:
            own = whose()
            assert own is not None
            if self in own.callback_handler.callbacks:
                self._renew(own)
            return train(own, *args, **kwargs)

        return renewed

    def _renew(self, trainer: Trainer) -> None:
        """Let the next `train()` build its engine anew, and its optimiser if other parameters are trained.

        A Trainer goes on with an engine of DeepSpeed that it has destroyed itself.
        """
        if self._stale is None:
            return
        if trainer.is_deepspeed_enabled:
            engine: Any = trainer.model_wrapped
            engine.destroy()
            model = _model_of(trainer)
            remove_leftovers(model)
            trainer.accelerator.deepspeed_engine_wrapped = None
            trainer.model_wrapped, trainer.deepspeed = model, None
        elif self._stale:
            trainer.optimizer = None
        self._stale = None

    def _find(self) -> Trainer | None:
        """The Trainer that has this callback: Trainers do not tell their callbacks."""
        found = (each for each in gc.get_objects() if issubclass(type(each), Trainer))
        handlers = ((each, getattr(each, "callback_handler", None)) for each in found)
        return next((each for each, handler in handlers if handler is not None and self in handler.callbacks), None)


class TrainerSession:
    """`cl_dist.continual(trainer, ...)`: the callback is in the Trainer inside the block.

    Args:
        trainer: A Trainer that has not begun.
        callback: Its callback.
    """

    def __init__(self, trainer: Trainer, callback: ContinualCallback) -> None:
        self._trainer, self._callback = trainer, callback

    def __enter__(self) -> Session:
        """Add the callback."""
        self._callback.join(self._trainer)
        self._trainer.add_callback(self._callback)
        return self._callback.session

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take it out again, with all hooks."""
        self._trainer.remove_callback(self._callback)
        self._trainer.__dict__.pop("train", None)
        self._callback.session.abandon()


def continual(
    trainer_or_engine: Any,
    optimizer: Any = None,
    *,
    method: MethodSettings,
    gradient_accumulation: int | None = None,
    keep_optimizer: bool = False,
    seed: int = 42,
    **settings: Any,
) -> LoopSession | TrainerSession:
    """Train inside the `with` block with methods against forgetting; the script stays as it is (docs/integrate.md).

    `with cl_dist.continual(trainer, method="migu", threshold=0.7) as session: ...`

    Args:
        trainer_or_engine: transformers' Trainer or a subclass; a DeepSpeed engine of stage 0 to 3; or a model of
            transformers or PEFT with float32 parameters, perhaps in a DistributedDataParallel or prepared by
            accelerate.
        optimizer: AdamW or Adam, for a model; its parameters are the model's.
        method: A method's name (docs/methods.md), a mapping with `name` and settings, or a list of them.
        gradient_accumulation: Backward passes per optimiser step of a plain loop, 1 by default. Trainer, accelerate and
            DeepSpeed know it themselves.
        keep_optimizer: Carry AdamW's moments from task to task. By default every task starts with fresh ones.
        seed: Seed of everything random that methods do.
        **settings: Settings of a method that is given by its name, as in a recipe.

    Returns:
        A context; inside it a `Session`. With a Trainer, every `train()` is a task. Otherwise the block is one, unless
        `session.task(name)` begins another; entering the same session again begins the next.

    Raises:
        BadInput: A setting is wrong, or the script does what the method cannot allow; the sentence says what is.
    """
    if isinstance(trainer_or_engine, Trainer):
        for name, value in (("optimizer", optimizer), ("gradient_accumulation", gradient_accumulation)):
            if value is not None:
                raise BadInput(f"cl_dist.continual: {name} is not read, the Trainer has its own; allowed: without it")
        callback = ContinualCallback(method, keep_optimizer=keep_optimizer, seed=seed, **settings)
        return TrainerSession(trainer_or_engine, callback)
    options: dict[str, Any] = {"keep_optimizer": keep_optimizer, "seed": seed}
    return LoopSession(trainer_or_engine, optimizer, method, settings, accumulation=gradient_accumulation, **options)


def check_arguments(args: TrainingArguments) -> None:
    """Refuse a Trainer's settings that no method can follow. Raises BadInput."""
    problems = {
        "torch_compile": args.torch_compile,
        "fp16": args.fp16,
        "fsdp": bool(args.fsdp),
        "auto_find_batch_size": args.auto_find_batch_size,
    }
    allowed = {"fp16": "bf16=True", "fsdp": "DDP, or deepspeed=... with ZeRO 1 to 3"}
    for name, given in problems.items():
        if given:
            raise BadInput(
                f"cl_dist.ContinualCallback: TrainingArguments.{name} is on, which no method can follow; allowed: "
                f"{allowed.get(name, f'{name}=False')}"
            )


def _driver_of(trainer: Trainer, session: Session) -> Driver:
    """What the Trainer trains with, now that `train()` has prepared it."""
    if trainer.is_deepspeed_enabled:
        return EngineDriver(trainer.model_wrapped, session)
    return LoopDriver(trainer.model_wrapped, trainer.optimizer, session, trainer.args.gradient_accumulation_steps)


def _model_of(trainer: Trainer) -> nn.Module:
    """The model itself, not what wraps it."""
    assert trainer.model is not None, "a Trainer has one from its beginning"
    return trainer.model


def _checkpoint(trainer: Trainer, state: TrainerState) -> Path:
    return Path(trainer._get_output_dir(trial=None)) / f"checkpoint-{state.global_step}"


def _resumed_from(trainer: Trainer, state: TrainerState) -> Path:
    """The checkpoint that `train(resume_from_checkpoint=...)` was given."""
    frame = sys._getframe()
    while (caller := frame.f_back) is not None:  # the Trainer does not keep it anywhere else
        frame = caller
        given = frame.f_locals.get("resume_from_checkpoint")
        if frame.f_locals.get("self") is trainer and isinstance(given, (str, Path)):
            return Path(given)
    return _checkpoint(trainer, state)
