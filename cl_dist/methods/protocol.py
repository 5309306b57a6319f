"""The method protocol: the moments of a run at which a method can act. By default, nothing happens at any of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from cl_dist.methods.config import MethodConfig, VariedConfig
from cl_dist.methods.cost import Cost
from cl_dist.methods.rehearsal import Rehearsed

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence, Set
    from pathlib import Path

    import torch

    from cl_dist.config.schema import TrainConfig
    from cl_dist.methods.cost import RankShare
    from cl_dist.methods.rehearsal import Rehearsal
    from cl_dist.sharding import Shard, ShardView
    from cl_dist.tasks.collate import Batch
    from cl_dist.tasks.plan import Cycles
    from cl_dist.tasks.types import Encoded


class Probe(ABC):
    """Measures the model on samples, between the steps of a task or after its last step.

    A measurement changes no weights, and nothing that other methods measure. The model is in evaluation mode (no
    dropout). Both methods are collective: all ranks must call them together.
    """

    tasks: Sequence[Sequence[Encoded]]
    """Each task's own training samples in stream order, up to and including the current task."""
    data: Mapping[str, Sequence[Encoded]]
    """The data sets that methods name (`MethodConfig.DATA`), by setting."""

    @abstractmethod
    def gradient(self, samples: Sequence[Encoded], take: Callable[[], None], *, mean: bool, what: str) -> bool:
        """Compute the gradient of the loss on `samples`, and let `take` read it through the `ShardView`.

        Args:
            samples: The same on all ranks; at least one, at most a global batch.
            take: Called once, when the gradient is reduced, as in `before_update`.
            mean: Whether the loss is the mean over the samples' targets; otherwise it is their sum.
            what: What is measured, for messages.

        Returns:
            Whether loss and gradient are finite. If not, `take` has not been called.

        Raises:
            JobFailed: They are not finite, and neither were the last `train.max_skipped_steps` measurements.
        """

    @abstractmethod
    def responses(self, take: Callable[[Batch, torch.Tensor, torch.Tensor], None]) -> None:
        """Run the model with its current weights over every input that this rank will train on in the task.

        Args:
            take: Called for each micro-batch with the arguments of `Method.added_loss`, but without a graph.
                `Batch.keys` identifies the inputs.
        """

    @abstractmethod
    def each(self, samples: Sequence[Encoded], take: Callable[[int], None]) -> None:
        """Run the model with its current weights over every sample by itself, without padding; the ranks take turns.

        What hooks see of a sample does not depend on the number of ranks. In every round each rank runs one sample.

        Args:
            samples: The same on all ranks.
            take: Called on all ranks after each round, with the number of samples that the round has measured: rank r
                has run the r-th of them. Ranks beyond that number have run a sample that does not count.
        """


@dataclass(frozen=True)
class TaskPlace:
    """The current task's place in the stream."""

    index: int
    """0-based position in the stream."""
    name: str
    steps: int
    """Optimiser steps of this task."""
    cycles: Cycles | None = None
    """How steps on the task's own samples alternate with steps on `Method.memory`; None: there is no memory."""
    probe: Probe | None = None
    """Measures the model on samples; None if an engine runs without a `TaskTrainer`."""

    def schedule(self, step: int) -> tuple[int, int]:
        """Position of a step in the learning rate schedule, and the schedule's length."""
        return (step, self.steps) if self.cycles is None else self.cycles.schedule(step)


@dataclass(frozen=True)
class Memory:
    """Samples of past tasks that get steps to themselves, in cycles with the steps on the task's own samples."""

    samples: Sequence[Encoded]
    inner: int
    """Steps on the task's own samples in each cycle."""
    outer: int
    """Steps on the memory that follow them."""
    last: bool = True
    """Whether a last cycle with fewer than `inner` own steps also has steps on the memory."""
    scheduled: bool = True
    """Whether the learning rate schedule counts the steps on the memory."""


class Method:
    """A continual-learning method. The engine calls its moments in the same order in every run.

    - once, before the first engine is built: `prepare_model`;
    - once per engine: `attach`, then the trials (`before_trial`, `after_trials`);
    - per task: `training_data`, `prepare_task`, `before_task`;
    - per step: `before_step`; then, per micro-batch, `before_forward`, `added_loss`, `before_backward`; then
      `before_update` and `after_update` (or `update_skipped`);
    - at the end of a task: `after_task`, `write_results`.

    Override the ones you need; docs/extending.md has a complete method.

    Args:
        config: The method's entry in the recipe.
    """

    Config: ClassVar[type[MethodConfig]] = MethodConfig
    """Settings of a method outside the package; by default it has none but its name."""

    needs_all_logits = False
    """Whether the output head must run over all positions, rather than only those that predict an answer."""
    keeps_unfused = False
    """Whether to save each task's weights as trained, before `after_task` changes them, next to its model."""
    later_tensors: frozenset[str] = frozenset()
    """Quantities in `tensors` that a state may lack because an older release of the method saved it. They are left as
    they are, and `load_state_dict` is called as usual."""

    def __init__(self, config: Any = None) -> None:
        self.config: Any = config
        """The method's entry in the recipe, with the current task's settings (`by_task`)."""
        self._everywhere = config

    def follow(self, task: str) -> None:
        """Switch to the settings of `task`, which is next. `before_task` follows; `attach` is not called again."""
        if isinstance(self.config, VariedConfig):
            self.config = self._everywhere.for_task(task)

    def cost(self, share: RankShare) -> Cost:
        """What the method adds on a rank, for `cl-dist plan`. Called instead of `attach`: no engine, no weights."""
        return Cost()

    def rehearse(self, rehearsal: Rehearsal) -> Rehearsed:
        """Go through the method's index arithmetic on all ranks' planned shards, for `cl-dist plan --dry-run`. Called
        instead of `attach`.

        Raises:
            BadInput: The method cannot train this model, as in `attach` and `after_trials`.
        """
        return Rehearsed()

    def prepare_model(self, model: torch.nn.Module, seed: int) -> None:
        """No engine has been built around `model` yet: add or freeze parameters now, as the first task needs them.

        Args:
            model: The loaded model; under ZeRO-3 its weights may be sharded.
            seed: `train.seed`.

        Raises:
            BadInput: The method cannot train this model; raised on all ranks alike.
        """

    def attach(self, model: torch.nn.Module, shards: ShardView, train: TrainConfig) -> None:
        """The engine has been built (or rebuilt) around `model`; `shards` gives access to its training state."""

    def before_trial(self, token_masks: Mapping[str, torch.Tensor]) -> None:
        """A tiny batch is about to run through the model in evaluation mode, before any training.

        Args:
            token_masks: The batch's real tokens, in the form of `Batch.token_masks`.
        """

    def after_trials(self, idle: Set[str]) -> None:
        """The trials are over.

        Args:
            idle: Names of the trainable parameters that got no gradient on any rank.

        Raises:
            BadInput: They show that the method cannot train this model; raised on all ranks alike.
        """

    def start_message(self) -> str | None:
        """One sentence for the log of a new run (after `attach`), or None."""
        return None

    def detach(self) -> None:
        """The engine is about to be taken apart: remove all hooks."""

    def training_data(self, index: int, tasks: Sequence[Sequence[Encoded]]) -> Sequence[Encoded]:
        """Samples that task `index` trains on in addition to its own, out of `tasks`, the stream's training samples.

        Called after `attach`. The answer must follow from the recipe alone, because a resume asks again.
        """
        return ()

    def memory(self, index: int, tasks: Sequence[Sequence[Encoded]]) -> Memory | None:
        """Samples that get steps to themselves during task `index`, or None; the rules of `training_data` apply."""
        return None

    def trains(self, index: int) -> bool:
        """Whether task `index` has any steps. If not, it keeps the model and the scores of the task before it."""
        return True

    def prepare_task(self, index: int) -> bool:
        """Get the model ready for task `index`; return whether the set of trained parameters has changed.

        If it has, the engine is rebuilt and `attach` is called again. A resume restores the task's state after this
        call; otherwise, the model is as the previous task left it. The model may already have been prepared for any
        other task, even a later one.
        """
        return False

    def before_task(self, place: TaskPlace) -> None:
        """A task begins or resumes, and the weights are in place."""

    def before_step(self, step: int) -> None:
        """Optimiser step `step` (0-based within the task) is about to begin. The task's probe can be used here."""

    def before_forward(self, step: int, batch: Batch) -> None:
        """A micro-batch of optimiser step `step` is about to run through the model in training."""

    def added_loss(self, batch: Batch, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor | None:
        """A loss to add to the micro-batch's own, summed over targets like that one; None adds nothing.

        The engine scales both alike, so that each becomes a mean over the targets of the global batch.

        Args:
            batch: The micro-batch.
            logits: `(batch, positions, classes)`, or `(batch, classes)` from a classifier, with their graph. A
                decoder's positions are those that predict an answer in any of the samples.
            labels: int64 with the leading shape of `logits`: the target at each position, or IGNORE.
        """
        return None

    def before_backward(self, loss: torch.Tensor) -> torch.Tensor:
        """Return the loss to differentiate: `loss` (a scalar, already scaled), perhaps with a penalty added."""
        return loss

    def before_update(self) -> None:
        """Gradients are reduced; norm, clipping and the optimiser come next. Called once per optimiser step."""

    def after_update(self) -> None:
        """The optimiser has stepped, and the model has its new weights."""

    def update_skipped(self) -> None:
        """Replaces `before_update` and `after_update` in a step whose loss or gradient is not finite.

        Such a step changes nothing: discard what you have collected for it.
        """

    def after_task(self, place: TaskPlace) -> None:
        """A task's last step is done, and its state is not saved yet. Evaluation and export follow."""

    def kept_share(self) -> float | None:
        """Share of the elements that were trainable when the run began which the current task updates in a step, on
        average; None: not known. Asked on all ranks when a task is trained, also after a resume.
        """
        return 1.0

    def write_results(self, folder: Path) -> None:
        """Write a task's results into its `folder`, next to its model; each file appears whole or not at all.

        Rank 0 calls this when the task's final state is saved, and again after a kill and a resume, when `tensors` and
        `state_dict` have been restored.
        """

    def before_save(self) -> None:
        """The current state is about to be saved. All ranks call this: it is the last chance to refuse."""

    def state_dict(self) -> dict[str, Any]:
        """JSON-serialisable state that a resume needs in addition to the recipe; empty if there is none."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned. Within a task, `before_task` has already been called."""

    def tensors(self) -> dict[str, dict[str, Shard]]:
        """Live tensors to save and restore, by quantity and parameter name; called after `attach`.

        Each shard covers the elements that this rank owns, so that any number of ranks can read them again.
        """
        return {}

    def tensors_loaded(self) -> None:
        """A saved state has been read into what `tensors` returned. All ranks call this."""
