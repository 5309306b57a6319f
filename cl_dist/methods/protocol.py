"""The method protocol: named moments of a run, each of which does nothing unless a method says otherwise."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from cl_dist.methods.config import MethodConfig, VariedConfig

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence, Set
    from pathlib import Path

    import torch

    from cl_dist.config.schema import TrainConfig
    from cl_dist.sharding import Shard, ShardView
    from cl_dist.tasks.collate import Batch
    from cl_dist.tasks.plan import Cycles
    from cl_dist.tasks.types import Encoded


class Probe(ABC):
    """What a method may ask of the model about samples, between the steps of a task or after its last one.

    Nothing that is trained, and nothing that another method measures, changes. The model is in evaluation mode: no
    dropout. All ranks have to ask together.
    """

    tasks: Sequence[Sequence[Encoded]]
    """Every task's own training samples, up to and with the task in hand, in the order of the stream."""

    @abstractmethod
    def gradient(self, samples: Sequence[Encoded], take: Callable[[], None], *, mean: bool, what: str) -> bool:
        """Let `take` read the reduced gradient of the samples' loss through the `ShardView`, as in `before_update`.

        Args:
            samples: The same on all ranks; at least one, at most a global batch.
            take: Called once.
            mean: The mean over the samples' targets; otherwise the sum.
            what: What is measured, for messages.

        Returns:
            Whether loss and gradient are finite numbers. Otherwise `take` was not called.

        Raises:
            JobFailed: They are not, and `train.max_skipped_steps` measurements in a row were not before.
        """

    @abstractmethod
    def responses(self, take: Callable[[Batch, torch.Tensor, torch.Tensor], None]) -> None:
        """Run the model, as it is now, over every input that this rank is going to learn in the task.

        Args:
            take: Called with each micro-batch, its logits and its labels, as `Method.added_loss` is, without a graph;
                `Batch.keys` tells the inputs apart.
        """


@dataclass(frozen=True)
class TaskPlace:
    """Where in the stream a task stands."""

    index: int
    """0-based position in the stream."""
    name: str
    steps: int
    """Optimiser steps of this task."""
    cycles: Cycles | None = None
    """How steps on own samples and on those of `Method.memory` alternate; None: all are on own ones."""
    probe: Probe | None = None
    """Asks about samples; None where an engine is driven without a `TaskTrainer`."""

    def schedule(self, step: int) -> tuple[int, int]:
        """Where in the learning rate's schedule a step stands, and the schedule's length."""
        return (step, self.steps) if self.cycles is None else self.cycles.schedule(step)


@dataclass(frozen=True)
class Memory:
    """Samples of past tasks that are learnt in steps of their own, between those of a task."""

    samples: Sequence[Encoded]
    inner: int
    """After so many steps on the task's own samples ..."""
    outer: int
    """... come so many on these."""
    last: bool = True
    """Whether they come after a last, shorter run of own steps too."""
    scheduled: bool = True
    """Whether the learning rate's schedule counts them."""


class Method:
    """A continual-learning method; the engine calls its moments in the same order in every run.

    `attach`, the trials, then for each task `training_data`, `prepare_task`, `before_task`, for each step
    `before_step`, (`before_forward`, `added_loss`, `before_backward`) per micro-batch, `before_update`, `after_update`,
    and finally `after_task` and `write_results`.

    Args:
        config: The recipe's entry.
    """

    Config: ClassVar[type[MethodConfig]] = MethodConfig
    """What settings a method of the user's own has; unless it says so, none but its name."""

    needs_all_logits = False
    """Whether the output head must run over every position, not only those that predict an answer."""
    keeps_unfused = False
    """Whether a task's weights as trained, before `after_task` changes them, are to be kept beside its model."""

    def __init__(self, config: Any = None) -> None:
        self.config: Any = config
        """The recipe's entry, with the settings of the task in hand (`by_task`)."""
        self._everywhere = config

    def follow(self, task: str) -> None:
        """Take the settings of a task, which comes next: `before_task` follows, and nothing is laid out anew."""
        if isinstance(self.config, VariedConfig):
            self.config = self._everywhere.for_task(task)

    def attach(self, model: torch.nn.Module, shards: ShardView, train: TrainConfig) -> None:
        """The engine was built (or rebuilt) around `model`; its training state is seen through `shards`."""

    def before_trial(self, token_masks: Mapping[str, torch.Tensor]) -> None:
        """A tiny batch is about to go through the model in evaluation mode, before anything is trained.

        Args:
            token_masks: Its real tokens, as `Batch.token_masks` has them.
        """

    def after_trials(self, idle: Set[str]) -> None:
        """The trials are over. `idle` are the trainable parameters that no rank got a gradient for, by name.

        Raises:
            BadInput: What they showed rules the method out; on all ranks alike.
        """

    def start_message(self) -> str | None:
        """One sentence for the log of a run that begins (after `attach`), or None."""
        return None

    def detach(self) -> None:
        """The engine is about to be taken apart: remove every hook."""

    def training_data(self, index: int, tasks: Sequence[Sequence[Encoded]]) -> Sequence[Encoded]:
        """Samples that task `index` is to train on beside its own, out of `tasks`, the stream's training samples.

        A function of the recipe alone (after `attach`): it is asked again after a resume.
        """
        return ()

    def memory(self, index: int, tasks: Sequence[Sequence[Encoded]]) -> Memory | None:
        """Samples that task `index` learns in steps of their own (see `training_data`), or None."""
        return None

    def trains(self, index: int) -> bool:
        """Whether task `index` has steps of its own; where not, the task before it leaves its model and its scores."""
        return True

    def prepare_task(self, index: int) -> bool:
        """Make the model ready for task `index`; return whether the set of trained parameters has changed, so that the
        engine must be built anew (and `attach` called again).

        Comes before the state of this task is restored, or, where the task starts at its beginning, when the model is
        as the task before left it. It may have been prepared for any task before, a later one too.
        """
        return False

    def before_task(self, place: TaskPlace) -> None:
        """A task begins, or goes on after a resume: the weights are in place."""

    def before_step(self, step: int) -> None:
        """Optimiser step `step` (0-based in its task) is about to begin; the task's probe can be asked."""

    def before_forward(self, step: int, batch: Batch) -> None:
        """A micro-batch of optimiser step `step` (0-based in its task) is about to go through the model in training."""

    def added_loss(self, batch: Batch, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor | None:
        """A loss to learn beside the micro-batch's own, summed over its targets like that one, or None.

        The engine scales both alike, so that it becomes a mean over the targets of the global batch.

        Args:
            batch: The micro-batch.
            logits: `(batch, positions, classes)`, with a classifier `(batch, classes)`, with their graph. A decoder's
                positions are those that predict an answer of any sample.
            labels: int64 of the leading shape of `logits`: what each position is to predict, or IGNORE.
        """
        return None

    def before_backward(self, loss: torch.Tensor) -> torch.Tensor:
        """Return the loss to differentiate: `loss` (a scalar, already scaled), or with a penalty added."""
        return loss

    def before_update(self) -> None:
        """Gradients are reduced; norm, clipping and optimiser come next. Once per optimiser step."""

    def after_update(self) -> None:
        """The optimiser has stepped and the model has its new weights."""

    def update_skipped(self) -> None:
        """In place of the two moments before: loss or gradient were not finite, and the step changes nothing.

        What was collected for the step is to be forgotten.
        """

    def after_task(self, place: TaskPlace) -> None:
        """A task's last step is done; its state is not yet saved. Evaluation and export come after."""

    def write_results(self, folder: Path) -> None:
        """Write what a task leaves beside its model into its `folder`, each file whole or not at all.

        Rank 0 comes here when the task's end state is saved, and once more after a kill and a resume, with what
        `tensors` and `state_dict` had kept.
        """

    def before_save(self) -> None:
        """The state of this moment is about to be saved (all ranks come here): the last chance to refuse it."""

    def state_dict(self) -> dict[str, Any]:
        """JSON-serialisable state that a resume needs beyond the recipe; empty when there is none."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the state that `state_dict` gave; inside a task `before_task` has been called before."""

    def tensors(self) -> dict[str, dict[str, Shard]]:
        """Live tensors to save and restore, by quantity and parameter name; called after `attach`.

        Each shard covers the elements that this rank owns, so that another number of ranks can read them.
        """
        return {}

    def tensors_loaded(self) -> None:
        """What `tensors` gave has been filled from a saved state (all ranks come here)."""
