"""A-GEM: to first order, a step must not increase the loss on past samples (arXiv 1812.00420).

From the second task on, each step first measures the reference gradient r of the loss on a few past samples, at the
same weights. If the step's own gradient g opposes it (g.r < 0), that part is removed: g - (g.r / r.r) r.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from cl_dist.config.schema import TrainConfig
from cl_dist.methods.agem.config import AgemConfig
from cl_dist.methods.cost import Cost, RankShare
from cl_dist.methods.protocol import Method, Probe, TaskPlace
from cl_dist.methods.rehearsal import Rehearsal, Rehearsed
from cl_dist.methods.shared.samples import check_fits_a_step, global_batch, past_samples
from cl_dist.seeds import derive_seed
from cl_dist.sharding import ShardView
from cl_dist.tasks.types import Encoded

CHUNK = 1 << 20
"""Elements that are converted to float64 at a time."""


class Agem(Method):
    """Averaged gradient episodic memory.

    Args:
        config: The method's entry in the recipe.
    """

    def __init__(self, config: AgemConfig) -> None:
        super().__init__(config)
        self.projected = 0
        """Number of steps in this process whose gradient was changed."""
        self._memory: Sequence[Encoded] = ()
        self._probe: Probe | None = None
        self._reference: dict[str, torch.Tensor] = {}

    def cost(self, share: RankShare) -> Cost:
        """A second gradient of what this rank owns. From the second task on, every step also has the collectives of the
        reference's forward and backward pass, which are those of the step itself.
        """
        return Cost(device={"agem's reference": share.gradient_bytes * share.elements}, passes=1)

    def rehearse(self, rehearsal: Rehearsal) -> Rehearsed:
        """Check that the reference samples fit into a step."""
        if self.config.memory_batch is not None:
            check_fits_a_step("memory_batch", self.config.memory_batch, rehearsal.train, rehearsal.shards.ranks)
        return Rehearsed()

    def attach(self, model: torch.nn.Module, shards: ShardView, train: TrainConfig) -> None:
        """Check that the reference samples fit into a step."""
        if self.config.memory_batch is not None:
            check_fits_a_step("memory_batch", self.config.memory_batch, train)
        self._size = self.config.memory_batch or global_batch(train)
        self._shards, self._seed, self._device = shards, train.seed, next(model.parameters()).device
        self._reference = {}

    def before_task(self, place: TaskPlace) -> None:
        """Draw the memory: a share of each past task's samples, the same ones in every later task."""
        self._task, self._probe = place.index, place.probe
        past = place.probe.tasks[: place.index] if place.probe is not None else ()
        self._memory = past_samples(past, self.config.memory_ratio, self._seed)

    def before_step(self, step: int) -> None:
        """Measure the reference gradient on samples drawn for this step."""
        self._reference = {}
        if not self._memory or self._probe is None:
            return
        draw = random.Random(derive_seed(self._seed, "reference", self._task, step))
        drawn = draw.sample(self._memory, min(self._size, len(self._memory)))
        self._probe.gradient(drawn, self._keep, mean=True, what=f"the reference gradient of step {step + 1}")

    def before_update(self) -> None:
        """Remove the part of the reduced gradient that opposes the reference."""
        if not self._reference:
            return
        along, square = self._products()
        if along < 0.0:
            self.projected += 1
            for name, reference in self._reference.items():
                gradient = self._shards.gradient(name)
                assert gradient is not None  # measuring the reference has reduced the same parameters
                gradient.data.add_(reference, alpha=-along / square)
                self._shards.gradient_changed(name)
        self._reference = {}

    def update_skipped(self) -> None:
        """Discard the reference of the skipped step."""
        self._reference = {}

    def _keep(self) -> None:
        """Copy this rank's part of the reduced gradient."""
        held = ((name, self._shards.gradient(name)) for name in self._shards.names)
        self._reference = {name: shard.data.clone() for name, shard in held if shard is not None}

    def _products(self) -> tuple[float, float]:
        """g.r and r.r in float64, over the elements of all ranks (collective: one all-reduce of two numbers)."""
        sums = torch.zeros(2, dtype=torch.float64, device=self._device)
        for name, reference in self._reference.items():
            whole, own = self._shards.gradient(name), self._shards.own_gradient(name)
            if whole is None or own is None:
                continue
            part = reference.narrow(0, own.start - whole.start, own.data.numel())
            for g, r in zip(own.data.split(CHUNK), part.split(CHUNK), strict=True):
                r = r.double()
                sums += torch.stack([g.double() @ r, r @ r]).to(self._device)
        along, square = self._shards.sum_over_ranks(sums).tolist()
        return along, square
