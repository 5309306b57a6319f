"""A-GEM: a step must not, to first order, make the loss on past samples larger (arXiv 1812.00420).

Before every step from the second task on, the gradient of the loss on a few samples of the past is measured at the same
weights. Where the step's own gradient points against it, that part is taken out: g - (g.r / r.r) r.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from cl_dist.config.schema import TrainConfig
from cl_dist.methods.agem.config import AgemConfig
from cl_dist.methods.protocol import Method, Probe, TaskPlace
from cl_dist.methods.shared.limits import check_fits_a_step, global_batch
from cl_dist.methods.shared.past_samples import past_samples
from cl_dist.seeds import derive_seed
from cl_dist.sharding import ShardView
from cl_dist.tasks.types import Encoded

CHUNK = 1 << 20
"""Elements of which a float64 copy is made at a time."""


class Agem(Method):
    """Averaged gradient episodic memory.

    Args:
        config: The recipe's `method` entry.
    """

    def __init__(self, config: AgemConfig) -> None:
        super().__init__(config)
        self.projected = 0
        """Steps of this process whose gradient was changed."""
        self._memory: Sequence[Encoded] = ()
        self._probe: Probe | None = None
        self._reference: dict[str, torch.Tensor] = {}

    def attach(self, model: torch.nn.Module, shards: ShardView, train: TrainConfig) -> None:
        """Note where gradients lie."""
        if self.config.memory_batch is not None:
            check_fits_a_step("memory_batch", self.config.memory_batch, train)
        self._size = self.config.memory_batch or global_batch(train)
        self._shards, self._seed, self._device = shards, train.seed, next(model.parameters()).device
        self._reference = {}

    def before_task(self, place: TaskPlace) -> None:
        """Draw the memory: a share of every past task's samples, the same ones for every later task."""
        self._task, self._probe = place.index, place.probe
        past = place.probe.tasks[: place.index] if place.probe is not None else ()
        self._memory = list(past_samples(past, self.config.memory_ratio, self._seed))

    def before_step(self, step: int) -> None:
        """Measure the reference gradient on samples drawn for this step."""
        self._reference = {}
        if not self._memory or self._probe is None:
            return
        draw = random.Random(derive_seed(self._seed, "reference", self._task, step))
        drawn = draw.sample(self._memory, min(self._size, len(self._memory)))
        self._probe.gradient(drawn, self._keep, mean=True, what=f"the reference gradient of step {step + 1}")

    def before_update(self) -> None:
        """Take out of the reduced gradient what points against the reference."""
        if not self._reference:
            return
        along, square = self._products()
        if along < 0.0:
            self.projected += 1
            for name, reference in self._reference.items():
                gradient = self._shards.gradient(name)
                assert gradient is not None  # it was reduced for the reference, by the same steps
                gradient.data.add_(reference, alpha=-along / square)
                self._shards.gradient_changed(name)
        self._reference = {}

    def update_skipped(self) -> None:
        """A step that changes nothing needs no reference."""
        self._reference = {}

    def _keep(self) -> None:
        """Copy the reduced gradient, as this rank holds it."""
        held = ((name, self._shards.gradient(name)) for name in self._shards.names)
        self._reference = {name: shard.data.clone() for name, shard in held if shard is not None}

    def _products(self) -> tuple[float, float]:
        """g.r and r.r over all ranks' elements, in float64 (collective: one all-reduce of two numbers)."""
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
