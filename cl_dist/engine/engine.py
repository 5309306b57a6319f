"""The DeepSpeed engine around a model, and the training step that calls the method at its named moments."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy

from cl_dist.config.schema import Recipe
from cl_dist.engine.device import device
from cl_dist.engine.distributed import free_memory, set_timeout
from cl_dist.engine.guard import UpdateGuard, check_replicas
from cl_dist.engine.settings import build_adamw, deepspeed_config, learning_rate
from cl_dist.engine.trial import counters_kept, failures_as_bad_input, idle_parameters, trial_batches
from cl_dist.errors import BadInput, ClDistError
from cl_dist.heartbeat import beat
from cl_dist.methods.protocol import Method, TaskPlace
from cl_dist.models.load import LoadedModel
from cl_dist.models.structure import base_model
from cl_dist.models.training_mode import evaluation_mode, layerdrop, switch_cache_off
from cl_dist.seeds import derive_seed
from cl_dist.sharding import (
    ShardView,
    check_deepspeed,
    gathered,
    release_before_forward,
    remove_leftovers,
    sharded_bytes,
)
from cl_dist.tasks.collate import Batch
from cl_dist.tasks.objectives import OBJECTIVES
from cl_dist.tasks.samples import Samples, join
from cl_dist.tasks.types import IGNORE, Encoded

GATHERED_SHARE = 0.5
"""Share of the free memory that whole weights may take; the rest is for keys and values, logits and activations."""


def loss_sum(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The training loss: cross-entropy summed over all targets, float32 scalar.

    Args:
        logits: `(..., classes)`, any floating dtype.
        labels: int64, with the leading shape of `logits`; positions labelled IGNORE do not count.
    """
    flat = logits.reshape(-1, logits.shape[-1]).float()
    return cross_entropy(flat, labels.reshape(-1), ignore_index=IGNORE, reduction="sum")


@dataclass(frozen=True)
class StepResult:
    """The result of one optimiser step on this rank."""

    loss_sum: float
    """Sum over all targets in this rank's micro-batches."""
    targets: int
    skipped: str | None = None
    """Why the update was skipped; None if it was applied."""


class TrainingEngine:
    """A model under DeepSpeed with a method attached.

    Args:
        loaded: Model, tokenizer and objective.
        recipe: The run's settings.
        method: The method against forgetting.

    Raises:
        ClDistError: This release does not know how the installed DeepSpeed lays out its shards.
        BadInput: The model cannot be trained as the recipe says.
    """

    def __init__(self, loaded: LoadedModel, recipe: Recipe, method: Method) -> None:
        if problems := check_deepspeed():
            raise ClDistError("; ".join(problems))
        self.objective = loaded.objective
        self.recipe = recipe
        self.method = method
        method.prepare_model(loaded.model, recipe.train.seed)
        self._build(loaded.model)

    def _build(self, model: torch.nn.Module) -> None:
        import deepspeed

        refuse_layerdrop(model, self.recipe.zero.stage, torch.distributed.get_world_size())
        switch_cache_off(model)
        self._engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=build_adamw(model, self.recipe.train),
            config=deepspeed_config(self.recipe),
            dist_init_required=False,
        )
        set_timeout(self.recipe.launch.timeout_seconds)
        release_before_forward(self._engine)
        # Most models can run their output head over chosen positions only, which saves memory.
        computes_some = "logits_to_keep" in inspect.signature(base_model(model).forward).parameters
        self._keeps_logits = computes_some and not self.method.needs_all_logits
        self.shards = ShardView(self._engine)
        self.shards.allocate_moments(step=0)
        self._guard = UpdateGuard(self.shards, self.recipe.train.max_skipped_steps)
        self._measuring_guard = UpdateGuard(self.shards, self.recipe.train.max_skipped_steps)
        self._take: Callable[[], None] | None = None
        self._trying = False
        self.shards.on_boundary(self.method.before_update, self.method.after_update, self._allows, self._update_skipped)
        self.method.attach(self.model, self.shards, self.recipe.train)
        self._try_out()

    def _try_out(self) -> None:
        """Run two tiny batches of made-up tokens through the model: the first forward and backward, the second forward.

        This shows within seconds whether the model can be trained at all, and lets the method see the outputs of its
        layers. As in `measure`, training state does not change. Collective.

        Raises:
            BadInput: A pass fails, or the method rejects what it saw; on all ranks alike.
        """
        first, second = (batch.to(device()) for batch in trial_batches(self.model, self.objective))
        self._trying, self._idle = True, frozenset[str]()
        devices = [device()] if device().type == "cuda" else []
        try:
            with (
                counters_kept(self._engine),
                evaluation_mode(self.model),
                torch.random.fork_rng(devices),
                failures_as_bad_input(),
            ):
                # A whole step, since DeepSpeed reduces gradients at its end only. `_allows` pauses the inner optimiser.
                for _ in range(self.recipe.train.gradient_accumulation):
                    self._engine.backward(loss_sum(*self._trial_forward(first)))
                    self._engine.step()
                # Batches of two shapes leave one way to read which output belongs to which token.
                with torch.no_grad():
                    self._trial_forward(second)
        finally:
            self._trying = False
        self.method.after_trials(self._idle)

    def _trial_forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        self.method.before_trial(batch.token_masks)
        return self._forward(batch)

    def rebuild(self) -> None:
        """Build a new DeepSpeed engine around the same model, after a change in which parameters are trainable.

        The optimiser state is reset. In bfloat16 the float32 masters are copied anew from the bfloat16 weights.
        """
        model = self.model
        self.destroy()
        self._build(model)

    def destroy(self) -> None:
        """Detach the method and remove DeepSpeed's hooks from the model."""
        self.method.detach()
        self._engine.destroy()
        remove_leftovers(self.model)

    @property
    def model(self) -> torch.nn.Module:
        """The module that DeepSpeed runs; under stage 3 its parameters are sharded."""
        return self._engine.module

    def training_data(self, index: int, tasks: Sequence[Sequence[Encoded]]) -> Samples:
        """The training samples of task `index`: its own, followed by those that the method adds."""
        return join([tasks[index], self.method.training_data(index, tasks)])

    def prepare_task(self, index: int) -> None:
        """Let the method prepare the model for task `index`; rebuild the engine if that changes which parameters are
        trained (collective).
        """
        if self.method.prepare_task(index):
            beat("building the engine", opaque=True)
            self.rebuild()

    def before_task(self, place: TaskPlace) -> None:
        """Begin a task: give the method its settings for it."""
        self._place = place
        self.method.follow(place.name)
        self.method.before_task(place)

    def learning_rate(self, step: int) -> float:
        """The scheduled learning rate of a step (0-based) of the current task."""
        return learning_rate(self.recipe.train, *self._place.schedule(step))

    def train_step(
        self, step: int, batches: Sequence[Batch], global_targets: int, real_batches: int | None = None
    ) -> StepResult:
        """Take one optimiser step over this rank's micro-batches of the global batch.

        Args:
            step: 0-based step of the task.
            batches: `train.gradient_accumulation` micro-batches.
            global_targets: Targets in the whole global batch, over all ranks and micro-batches.
            real_batches: Micro-batches of the global batch with at least one sample; None: all.

        Raises:
            JobFailed: The loss or the gradient norm is not finite and no further step may be skipped, or the ranks'
                weights have diverged; on all ranks alike.
        """
        train = self.recipe.train
        where = f"task {self._place.name}, step {step + 1}"
        self.method.before_step(step)
        self.model.train()
        self._guard.begin(where)

        # Dropout depends on the position in the run alone, so a resumed run repeats it without saved generator states.
        torch.manual_seed(derive_seed(train.seed, "step", self._place.index, step, torch.distributed.get_rank()))
        self.shards.set_learning_rate(self.learning_rate(step))

        # The last micro-batch ends the step: DeepSpeed reduces the gradients, and `ShardView.on_boundary` runs the
        # method's moments around the update, or skips it where `_allows` says no.
        for batch in batches:
            self._micro_step(step, batch.to(device()), global_targets, real_batches)
        targets = sum(batch.targets for batch in batches)

        every = train.check_replicas_every
        if every is not None and (step + 1) % every == 0:
            check_replicas(self.model, where)
        return StepResult(sum(self._guard.losses), targets, self._guard.skipped)

    def _micro_step(self, step: int, batch: Batch, global_targets: int, real_batches: int | None = None) -> None:
        self.method.before_forward(step, batch)
        logits, labels = self._forward(batch)
        total = loss_sum(logits, labels)
        # A loss that is not finite still goes backward, because the other ranks are waiting in its collectives.
        self._guard.note_loss(total, batch.indices)
        beat()

        # The method may add a term of its own, which is scaled along with the loss.
        added = self.method.added_loss(batch, logits, labels)
        total = total if added is None else total + added
        loss = total * self._loss_scale(batch, global_targets, real_batches)
        self._engine.backward(self.method.before_backward(loss))
        self._engine.step()
        beat()

    def _forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the model; returns logits and the labels they predict (shapes: `Method.added_loss`)."""
        return OBJECTIVES[self.objective].forward(self._engine, batch, self._keeps_logits)

    def predict(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits and labels of a micro-batch (shapes: `Method.added_loss`), without dropout or autograd graph.

        Collective under stage 3.
        """
        with evaluation_mode(self.model), torch.no_grad():
            return self._forward(batch)

    @contextmanager
    def whole(self) -> Iterator[bool]:
        """Hold the weights whole inside the block, if stage 3 shards them and they fit (collective).

        Yields whether they are: then a forward pass inside needs no other rank. `eval.gather_weights` decides.
        """
        policy = self.recipe.eval.gather_weights
        if self.recipe.zero.stage != 3 or policy == "never" or (policy == "auto" and not self._fits_whole()):
            yield False
            return
        beat("gathering the weights")
        with gathered(self._engine):
            yield True

    def _fits_whole(self) -> bool:
        """Whether the missing weights take at most `GATHERED_SHARE` of the free memory on every rank (collective)."""
        spare = GATHERED_SHARE * free_memory() - sharded_bytes(self.model)
        least = torch.tensor(spare, dtype=torch.float64, device=device())
        torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN)
        return least.item() >= 0

    def measure(self, batches: Sequence[Batch], targets: int, what: str, take: Callable[[], None]) -> bool:
        """Let `take` read the reduced gradient of the loss on some micro-batches, between two steps (collective).

        Weights, moments, step count, learning rate and the methods' own measurements stay bitwise the same: DeepSpeed
        runs a whole step with its inner optimiser paused, and no method is called. The model is in evaluation mode, so
        there is no dropout and the methods' hooks ignore the passes.

        Args:
            batches: This rank's `train.gradient_accumulation` micro-batches, of any size.
            targets: Divisor of the summed loss.
            what: What is being measured, for messages.
            take: Called once, where `Method.before_update` would be.

        Returns:
            Whether loss and gradient are finite on all ranks; if not, `take` is not called.

        Raises:
            JobFailed: They are not, and no further measurement may be skipped (`train.max_skipped_steps`).
        """
        train = self.recipe.train
        pieces = train.gradient_accumulation * torch.distributed.get_world_size()
        self._measuring_guard.begin(f"task {self._place.name}, {what}")
        # A few models apply dropout in the block itself, and a block that recomputes its activations stays in training
        # mode even here.
        torch.manual_seed(derive_seed(train.seed, "measure", self._place.index, what, torch.distributed.get_rank()))
        self._take = take
        try:
            with evaluation_mode(self.model):
                for batch in batches:
                    total = loss_sum(*self._forward(batch.to(device())))
                    self._measuring_guard.note_loss(total, batch.indices)
                    beat()
                    self._engine.backward(total * (pieces / max(1, targets)))
                    self._engine.step()  # after the last micro-batch this calls `_allows`, which calls `take`
                    beat()
        finally:
            self._take = None
        return self._measuring_guard.skipped is None

    def _loss_scale(self, batch: Batch, global_targets: int, real_batches: int | None) -> float:
        """The factor that turns the gradient of the summed loss into that of the mean set by `train.loss_average`.

        DeepSpeed divides by the number of micro-batches in a step and by the number of ranks (together `pieces`), which
        this undoes. The mean over all tokens then divides by the targets of the global batch; the mean of means divides
        by the targets of this micro-batch and by the number of micro-batches with samples.
        """
        pieces = self.recipe.train.gradient_accumulation * torch.distributed.get_world_size()
        if self.recipe.train.loss_average == "micro_batch":
            return pieces / (real_batches or pieces) / max(1, batch.targets)
        return pieces / max(1, global_targets)

    def _allows(self) -> bool:
        """Whether to apply the reduced gradient: never in a trial or a measurement, which read it here instead."""
        if self._trying:
            self._idle = idle_parameters(self.shards)
            return False
        if self._take is None:
            return self._guard.allows()
        if self._measuring_guard.allows():
            self._take()
        return False

    def _update_skipped(self) -> None:
        if self._take is None and not self._trying:
            self.method.update_skipped()


def refuse_layerdrop(model: torch.nn.Module, stage: int, ranks: int) -> None:
    """Raises BadInput for layerdrop on several ranks: each would skip different layers, so they would wait for each
    other or add up gradients of different layers.
    """
    if stage > 0 and ranks > 1 and (dropped := layerdrop(model)):
        raise BadInput(
            f"model.name_or_path: the model's configuration ({dropped}) drops layers at random in training, different "
            "ones on each rank, which ZeRO does not support; set it to 0, or use zero.stage: 0 or a single rank"
        )
