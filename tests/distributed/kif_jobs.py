"""Rank side of test_kif: many cases in one start of the ranks, each trained with cl_dist and densely."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch

from cl_dist.config.schema import LoraConfig, ModelConfig, Recipe, StreamConfig, TaskConfig, TrainConfig, ZeroConfig
from cl_dist.engine.distributed import join
from cl_dist.engine.engine import TrainingEngine
from cl_dist.methods.composed import Composed
from cl_dist.methods.kif.config import KifConfig
from cl_dist.methods.kif.method import Kif
from cl_dist.methods.protocol import Method, TaskPlace
from cl_dist.models.load import LoadedModel
from cl_dist.models.lora import add_lora
from cl_dist.sharding import ShardView
from tests.distributed.exactness_jobs import _published_error
from tests.distributed.worlds import (
    OBJECTIVES,
    distance,
    gradient_sums,
    mean_loss,
    micro_batches,
    odd_model,
    samples,
    together,
    whole,
)
from tests.oracle_kif import Dense, Settings, Unit, normalised

TASKS = 3
STEPS = 2
RANKS = 3
"""LoRA's r: odd, so that pieces of the flattened matrices end inside rows and columns."""


def run_cases(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each case how far cl_dist and the oracle are apart after each task."""
    join(timeout_seconds=120)
    return [Case(**case).run() for case in cases]


class Recorder(Method):
    """Behind a method that measures importance: keeps the weights and reduced gradients that it saw, whole."""

    def attach(self, model: torch.nn.Module, shards: ShardView, train: TrainConfig) -> None:
        """Remember where to look, and look at the weights behind every step of the optimiser, before any fusion."""
        self._shards = shards
        shards.layout.inner.register_step_post_hook(self._stepped)

    def _stepped(self, *_: Any) -> None:
        self.updated = whole(self._shards, "master")

    def before_update(self) -> None:
        """Put all ranks' shards together; the gradient has the penalty's in it, and is not clipped yet."""
        gradients = {name: self._shards.gradient(name) for name in self._shards.names}
        held = {name: shard for name, shard in gradients.items() if shard is not None}
        self.weights, self.gradients = whole(self._shards, "master"), together(held, self._shards)

    def given_to(self, dense: Dense) -> None:
        """Let the oracle take the step's importance from what was seen."""
        if dense.settings.importance_at == "before_update":
            dense.measure(self.weights, self.gradients)
            return
        norm = torch.cat([gradient.double().reshape(-1) for gradient in self.gradients.values()]).norm()
        factor = 1.0 if dense.settings.clip is None else min(1.0, dense.settings.clip / (float(norm) + 1e-6))
        dense.measure(self.updated, {name: gradient * factor for name, gradient in self.gradients.items()})


class Case:
    """One configuration, trained both ways."""

    def __init__(
        self, stage: int, units: str, order: str = "mixed", fusion: str = "adaptive", lora: bool = False,
        family: str = "llama", dtype: str = "float32", accumulation: int = 1, clip: float | None = None,
        offload: bool = False, orthogonal: float = 0.0, keep_optimizer: bool = False,
        deepspeed: dict[str, Any] | None = None, importance_dtype: str = "float32",
        importance_at: str = "before_update", importance_from_step: int = 1, grad_dtype: str | None = None,
        by_task: dict[str, dict[str, Any]] | None = None, **constants: float,
    ) -> None:  # fmt: skip
        self.family, self.accumulation, self.dtype, self.stage = family, accumulation, dtype, stage
        self.world, self.rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
        self.micro = 4 // self.world
        adapters = LoraConfig(r=RANKS, alpha=RANKS) if lora else None
        config = KifConfig(
            name="kif", units=units, order=order, fusion=fusion, orthogonal=orthogonal,  # type: ignore[arg-type]
            importance_dtype=importance_dtype, importance_at=importance_at,  # type: ignore[arg-type]
            importance_from_step=importance_from_step, by_task=by_task or {}, **constants,  # type: ignore[arg-type]
        )  # fmt: skip
        recipe = Recipe(
            model=ModelConfig(name_or_path="odd", lora=adapters),
            stream=StreamConfig(tasks=tuple(TaskConfig(name=f"t{i}", format="builtin") for i in range(TASKS))),
            method=(config,),
            train=TrainConfig(
                micro_batch_size=self.micro, gradient_accumulation=accumulation, learning_rate=1e-2, eps=1e-2,
                clip=clip, dtype=dtype, keep_optimizer=keep_optimizer,  # type: ignore[arg-type]
                grad_dtype=grad_dtype,  # type: ignore[arg-type]
            ),
            zero=ZeroConfig(stage=stage, offload=offload, deepspeed=deepspeed or {}),  # type: ignore[arg-type]
            output_dir="unused",
        )  # fmt: skip
        model = odd_model(family)
        if adapters is not None:
            model = add_lora(model, adapters, OBJECTIVES[family], seed=1)  # type: ignore[arg-type]
        model = model.to(getattr(torch, dtype))
        settings = Settings(
            units, order, fusion, clip=clip, orthogonal=orthogonal, keep_optimizer=keep_optimizer,
            importance_at=importance_at, importance_from_step=importance_from_step, **constants,
        )  # fmt: skip
        self.by_task = by_task or {}
        self.worst: dict[str, float] = {}
        self.settings = settings
        self.dense = Dense(copy.deepcopy(model), settings)
        self.given = Dense(copy.deepcopy(model), settings)
        """The oracle again, given the weights and gradients that the ranks have."""
        self.local = copy.deepcopy(model)
        """The model before any step, for this rank's own gradients."""
        self.recorder = Recorder()
        self.kif = Kif(config)
        self.engine = TrainingEngine(
            LoadedModel(model, None, OBJECTIVES[family]), recipe, Composed([self.kif, self.recorder])
        )  # type: ignore[arg-type]

    def run(self) -> dict[str, Any]:
        """Train the stream; the largest of each error over the tasks."""
        worst = self.worst
        for index in range(TASKS):
            for quantity, error in self._task(index).items():
                worst[quantity] = max(worst.get(quantity, 0.0), error)
        self.engine.destroy()
        return worst

    def _task(self, index: int) -> dict[str, float]:
        place = TaskPlace(index, f"t{index}", STEPS)
        own = dataclasses.replace(self.settings, **self.by_task.get(place.name, {}))
        self.dense.settings = self.given.settings = own
        if not self.dense.settings.keep_optimizer:
            self.engine.shards.reset_optimizer()
        self.engine.before_task(place)
        self.dense.start_task()
        self.given.start_task()
        for step in range(STEPS):
            self._step(step, seed=10 * index + step)
        errors = {
            "smoothed": _apart(self._along_shards("smoothed"), self.dense.importance),
            "uncertainty": _apart(self._along_shards("uncertainty"), self.dense.deviation),
            "trained": _apart(whole(self.engine.shards, "master"), self.dense.masters),
        }
        for name, trained in whole(self.engine.shards, "master").items():
            self.given.masters[name].data.copy_(trained)
        self.engine.method.after_task(place)
        self.dense.end_task()
        self.given.end_task()
        masters = whole(self.engine.shards, "master")
        given = {f"given {quantity}": error for quantity, error in self._scores(self.given).items()}
        given["given fused"] = _apart(masters, self.given.masters)
        return {**errors, **self._scores(self.dense), **given, **self._end(masters)}

    def _step(self, step: int, seed: int) -> None:
        per_rank = self.micro * self.accumulation
        batch = samples(self.family, per_rank * self.world, seed=seed)
        chunks = [batch[r * per_rank : (r + 1) * per_rank] for r in range(self.world)]
        everyone = [micro_batches(self.family, chunk, self.micro) for chunk in chunks]
        targets = sum(b.targets for rank in everyone for b in rank)
        self.engine.train_step(step, everyone[self.rank], targets)
        self.dense.step([mean_loss(b, self.family, targets) for rank in everyone for b in rank])
        self.recorder.given_to(self.given)
        if seed == 0 and self.dtype == "bfloat16" and not self.settings.orthogonal:
            expected = gradient_sums(self.local, everyone[self.rank], self.family, targets, self.stage)
            self.worst["sum"] = distance(self.recorder.gradients, expected)

    def _along_shards(self, quantity: str) -> dict[str, torch.Tensor]:
        return together(self.kif.tensors()[quantity], self.engine.shards)

    def _scores(self, dense: Dense) -> dict[str, float]:
        """Errors of the unit scores, the units found by their slices in units.json."""
        scores = self.kif.scores
        units = [_unit(slices) for slices in self.kif.units.as_json().values()]
        assert set(units) == set(dense.units)
        assert len(units) == len(dense.units)

        def column(values: dict[Unit, float]) -> torch.Tensor:
            return torch.tensor([values[unit] for unit in units], dtype=torch.float64)

        return {
            "score": _relative(scores.current, column(dense.scores)),
            "each": _relative_each(scores.current, column(dense.scores)),
            "normalised": _relative(scores.current_normalised, column(normalised(dense.scores))),
            "accumulated": _relative(scores.accumulated_normalised, column(dense.accumulated)),
            "share": _relative(scores.share_new, column(dense.shares)),
        }

    def _end(self, masters: dict[str, torch.Tensor]) -> dict[str, float]:
        return {
            "fused": _apart(masters, self.dense.masters),
            "kept": _apart(self._along_shards("fused"), masters),
            "unpublished": _unpublished(self.engine.model, masters),
            "left": max(float(t.abs().max()) for t in self._along_shards("smoothed").values()),
        }


def _unit(slices: list[dict[str, Any]]) -> Unit:
    return frozenset((entry["parameter"], tuple((start, stop) for start, stop in entry["slices"])) for entry in slices)


def _relative(ours: torch.Tensor, truth: torch.Tensor) -> float:
    return float((ours - truth).abs().max() / truth.abs().max().clamp(min=1e-300))


def _relative_each(ours: torch.Tensor, truth: torch.Tensor) -> float:
    """Largest relative error of any one score, but for those of rounding noise (the gradient of a key's bias is
    zero); zeros have to be zeros."""
    if not torch.equal(ours == 0, truth == 0):
        return float("inf")
    told = truth > 1e-10 * truth.max()
    return float(((ours - truth).abs() / truth)[told].max())


def _apart(ours: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> float:
    """Largest difference of all parameters, relative to the largest number of all."""
    scale = max(float(tensor.detach().abs().max()) for tensor in truth.values())
    differences = [float((ours[name] - tensor.detach()).abs().max()) for name, tensor in truth.items()]
    return float(torch.tensor(differences).max()) / scale  # NaN stays NaN


def _unpublished(model: torch.nn.Module, masters: dict[str, torch.Tensor]) -> float:
    trained = [(name, param) for name, param in model.named_parameters() if name in masters]

    class Trained:
        named_parameters = staticmethod(lambda: trained)

    return _published_error(Trained, masters)  # type: ignore[arg-type]
