"""One DeepSpeed engine, and the training step with its named moments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from cl_dist.config.schema import Recipe
from cl_dist.engine.distributed import device, set_timeout
from cl_dist.engine.ds_config import deepspeed_config
from cl_dist.engine.guard import UpdateGuard, check_replicas
from cl_dist.engine.objective import keeps_logits, loss_sum
from cl_dist.engine.optimizer import build_adamw, learning_rate
from cl_dist.engine.trial import told_by_trial, trial_batches
from cl_dist.errors import BadInput, ClDistError
from cl_dist.heartbeat import beat
from cl_dist.methods.protocol import Method, TaskPlace
from cl_dist.models.load import LoadedModel
from cl_dist.models.structure import base_model
from cl_dist.models.training_mode import evaluation_mode, layerdrop, switch_cache_off
from cl_dist.seeds import derive_seed
from cl_dist.sharding import ShardView, check_deepspeed, remove_leftovers
from cl_dist.tasks.collate import Batch
from cl_dist.tasks.objectives import OBJECTIVES
from cl_dist.tasks.types import Encoded

_COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")
"""What DeepSpeed counts, put back after a trial."""


@dataclass(frozen=True)
class StepResult:
    """What one optimiser step did on this rank."""

    loss_sum: float
    """Loss summed over the targets of this rank's micro-batches."""
    targets: int
    """Targets in this rank's micro-batches."""
    skipped: str | None = None
    """Why nothing was updated; None: it was."""


class TrainingEngine:
    """The model under DeepSpeed, the method attached to it.

    Args:
        loaded: Model, tokenizer and objective.
        recipe: The run's settings (`train` and `zero` are read).
        method: What is to be done about forgetting.

    Raises:
        ClDistError: The installed DeepSpeed is not one whose shards this release knows.
        BadInput: The model cannot be trained as the recipe says.
    """

    def __init__(self, loaded: LoadedModel, recipe: Recipe, method: Method) -> None:
        problems = check_deepspeed()
        if problems:
            raise ClDistError("; ".join(problems))
        self.objective = loaded.objective
        self.recipe = recipe
        self.method = method
        self._build(loaded.model)

    def _build(self, model: torch.nn.Module) -> None:
        import deepspeed

        base = base_model(model)
        _refuse_layerdrop(model, self.recipe.zero.stage)
        switch_cache_off(model)
        self._engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=build_adamw(model, self.recipe.train),
            config=deepspeed_config(self.recipe),
            dist_init_required=False,
        )
        set_timeout(self.recipe.launch.timeout_seconds)
        self._keeps_logits = keeps_logits(base) and not self.method.needs_all_logits
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
        """Send two tiny batches of made-up tokens through the model, the first one backward too (collective).

        Finds out in the first seconds whether the model can be trained at all, and shows the method what its layers'
        outputs are. As with `measure`, nothing that is trained changes: DeepSpeed goes through a step of its own, in
        which the inner optimiser is paused. The random number generators and DeepSpeed's counters are put back.

        Raises:
            BadInput: A pass fails, or a method cannot do with what it saw; on all ranks alike.
        """
        first, second = (batch.to(device()) for batch in trial_batches(self.model, self.objective))
        counters = {name: getattr(self._engine, name) for name in _COUNTERS if hasattr(self._engine, name)}
        self._trying, self._idle = True, frozenset[str]()
        devices = [device()] if device().type == "cuda" else []
        try:
            with evaluation_mode(self.model), torch.random.fork_rng(devices), told_by_trial():
                for _ in range(self.recipe.train.gradient_accumulation):
                    self._engine.backward(loss_sum(*self._trial_forward(first)))
                    self._engine.step()
                with torch.no_grad():
                    self._trial_forward(second)
        finally:
            self._trying = False
        for name, value in counters.items():
            setattr(self._engine, name, value)
        self.method.after_trials(self._idle)

    def _trial_forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        self.method.before_trial(batch.token_masks)
        return self._forward(batch)

    def _without_gradient(self) -> frozenset[str]:
        """Trainable parameters whose reduced gradient is zero on all ranks (collective)."""
        found = [self.shards.gradient(name) for name in self.shards.names]
        flags = [shard is not None and bool(shard.data.count_nonzero()) for shard in found]
        reached = torch.tensor(flags, dtype=torch.float32, device=device())
        torch.distributed.all_reduce(reached)
        return frozenset(name for name, flag in zip(self.shards.names, reached.tolist(), strict=True) if not flag)

    def rebuild(self) -> None:
        """Build a new DeepSpeed engine around the same model in the same process group.

        For a method that changes the set of trainable parameters. The optimiser starts afresh, and in bfloat16 so do
        the float32 masters, from the bfloat16 weights.
        """
        model = self.model
        self.destroy()
        self._build(model)

    def destroy(self) -> None:
        """Detach the method and take DeepSpeed's hooks out of the model."""
        self.method.detach()
        self._engine.destroy()
        remove_leftovers(self.model)

    @property
    def model(self) -> torch.nn.Module:
        """The module that DeepSpeed runs; under stage 3 its parameters are sharded."""
        return self._engine.module

    def training_data(self, index: int, tasks: Sequence[Sequence[Encoded]]) -> list[Encoded]:
        """The training samples of task `index`, its own first, and those that the method adds."""
        return [*tasks[index], *self.method.training_data(index, tasks)]

    def prepare_task(self, index: int) -> None:
        """Let the method make the model ready for task `index`, and build the engine anew where it changes what is
        trained (collective).
        """
        if self.method.prepare_task(index):
            beat("building the engine", opaque=True)
            self.rebuild()

    def before_task(self, place: TaskPlace) -> None:
        """Let a task begin: the method gets its settings there."""
        self._place = place
        self.method.follow(place.name)
        self.method.before_task(place)

    def learning_rate(self, step: int) -> float:
        """Learning rate of a step (0-based) of the task in hand, as the schedule has it."""
        return learning_rate(self.recipe.train, *self._place.schedule(step))

    def train_step(
        self, step: int, batches: Sequence[Batch], global_targets: int, real_batches: int | None = None
    ) -> StepResult:
        """One optimiser step over this rank's micro-batches of the global batch.

        Args:
            step: 0-based step of the task.
            batches: `train.gradient_accumulation` micro-batches.
            global_targets: Targets in the whole global batch, over all ranks and micro-batches.
            real_batches: Micro-batches of the global batch that are not fillers alone; None: all.

        Raises:
            JobFailed: The loss or the gradient's norm is not a finite number and no (further) step may be skipped, or
                the ranks no longer hold the same weights; on all ranks alike.
        """
        self.method.before_step(step)
        self.model.train()
        train = self.recipe.train
        where = f"task {self._place.name}, step {step + 1}"
        self._guard.begin(where)
        torch.manual_seed(derive_seed(train.seed, "step", self._place.index, step, torch.distributed.get_rank()))
        self.shards.set_learning_rate(self.learning_rate(step))
        total = sum(self._micro_step(step, batch.to(device()), global_targets, real_batches) for batch in batches)
        targets = sum(batch.targets for batch in batches)
        every = train.check_replicas_every
        if every is not None and (step + 1) % every == 0:
            check_replicas(self.model, where)
        return StepResult(total, targets, self._guard.skipped)

    def _micro_step(self, step: int, batch: Batch, global_targets: int, real_batches: int | None = None) -> float:
        self.method.before_forward(step, batch)
        logits, labels = self._forward(batch)
        total = loss_sum(logits, labels)
        # Backward runs with a loss that is not finite too: the other ranks take part in its collectives.
        value = self._guard.note_loss(total, batch.indices)
        beat()
        added = self.method.added_loss(batch, logits, labels)
        total = total if added is None else total + added
        loss = total * self._loss_scale(batch, global_targets, real_batches)
        self._engine.backward(self.method.before_backward(loss))
        self._engine.step()
        beat()
        return value

    def _forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Forward pass: logits, and the labels that they are to predict (shapes: `Method.added_loss`)."""
        return OBJECTIVES[self.objective].forward(self._engine, batch, self._keeps_logits)

    def predict(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits and labels of a micro-batch (shapes: `Method.added_loss`), without dropout and without a graph
        (collective under stage 3).
        """
        with evaluation_mode(self.model), torch.no_grad():
            return self._forward(batch)

    def measure(self, batches: Sequence[Batch], targets: int, what: str, take: Callable[[], None]) -> bool:
        """Let `take` read the reduced gradient of some micro-batches' loss, between two steps (collective).

        Weights, moments, step count, learning rate and what methods measure stay as they are to the last bit: DeepSpeed
        goes through a step of its own, in which the inner optimiser is paused, and no method's moment is called. The
        model is in evaluation mode: no dropout, and the hooks of methods let the passes go by.

        Args:
            batches: `train.gradient_accumulation` micro-batches of this rank, of any size.
            targets: What the summed loss is divided by.
            what: What is measured, for messages.
            take: Called once, where `Method.before_update` would be.

        Returns:
            Whether loss and gradient of all ranks are finite; otherwise `take` is not called.

        Raises:
            JobFailed: They are not, and no (further) measurement may be left out (`train.max_skipped_steps`).
        """
        train = self.recipe.train
        pieces = train.gradient_accumulation * torch.distributed.get_world_size()
        self._measuring_guard.begin(f"task {self._place.name}, {what}")
        # A few models drop out in a block itself, which recomputes only while it says that it trains.
        torch.manual_seed(derive_seed(train.seed, "measure", self._place.index, what, torch.distributed.get_rank()))
        self._take = take
        try:
            with evaluation_mode(self.model):
                for batch in batches:
                    self._measure_micro_batch(batch.to(device()), pieces / max(1, targets))
        finally:
            self._take = None
        return self._measuring_guard.skipped is None

    def _measure_micro_batch(self, batch: Batch, scale: float) -> None:
        total = loss_sum(*self._forward(batch))
        self._measuring_guard.note_loss(total, batch.indices)
        beat()
        self._engine.backward(total * scale)
        self._engine.step()
        beat()

    def _loss_scale(self, batch: Batch, global_targets: int, real_batches: int | None) -> float:
        """Factor that makes the gradient of the summed loss the wanted mean.

        DeepSpeed divides by the micro-batches of a step and by the ranks. The mean over all tokens needs neither, and
        the mean of means divides by the micro-batches that hold samples.
        """
        pieces = self.recipe.train.gradient_accumulation * torch.distributed.get_world_size()
        if self.recipe.train.loss_average == "micro_batch":
            return pieces / (real_batches or pieces) / max(1, batch.targets)
        return pieces / max(1, global_targets)

    def _allows(self) -> bool:
        """Whether what was just reduced is to be learnt."""
        if self._trying:
            self._idle = self._without_gradient()
            return False
        if self._take is None:
            return self._guard.allows()
        if self._measuring_guard.allows():
            self._take()
        return False

    def _update_skipped(self) -> None:
        if self._take is None and not self._trying:
            self.method.update_skipped()


def _refuse_layerdrop(model: torch.nn.Module, stage: int) -> None:
    """Ranks that leave out other layers would wait for each other, or add up gradients of different layers."""
    if stage > 0 and torch.distributed.get_world_size() > 1 and (dropped := layerdrop(model)):
        raise BadInput(
            f"model.name_or_path: the model's configuration ({dropped}) leaves out layers at random while it trains, "
            "on each rank others, which ZeRO cannot do; allowed are 0 there, zero.stage: 0 and a single rank"
        )
