"""Rank side of test_exactness: many cases in one start of the ranks."""

from __future__ import annotations

import copy
from typing import Any

import torch

from cl_dist.config.schema import ModelConfig, Recipe, StreamConfig, TaskConfig, TrainConfig, ZeroConfig
from cl_dist.engine.distributed import join
from cl_dist.engine.engine import TrainingEngine
from cl_dist.methods.composed import Composed
from cl_dist.methods.migu.config import MiguConfig
from cl_dist.methods.migu.method import Migu
from cl_dist.methods.protocol import Method, TaskPlace
from cl_dist.models.load import LoadedModel
from cl_dist.models.tracked import tracked_linears
from cl_dist.models.training_mode import enable_activation_checkpointing
from cl_dist.sharding import ShardView
from cl_dist.tasks.collate import Batch
from tests.distributed.worlds import (
    OBJECTIVES,
    distance,
    gradient_sums,
    mean_loss,
    micro_batches,
    odd_lora,
    odd_model,
    samples,
    together,
    whole,
)
from tests.oracle import Dense, Settings

QUANTITIES = ("master", "exp_avg", "exp_avg_sq")


def run_cases(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Train every case with cl_dist and densely; say how far apart they are and which rows moved."""
    join(timeout_seconds=120)
    return [Case(**case).run() for case in cases]


class Recorder(Method):
    """Behind MIGU: keeps the reduced gradients of the last step, whole."""

    def attach(self, model: torch.nn.Module, shards: ShardView, train: TrainConfig) -> None:
        """Remember where to look."""
        self._shards = shards

    def before_update(self) -> None:
        """Put all ranks' shards together."""
        held = {name: self._shards.own_gradient(name) for name in self._shards.names}
        self.gradients = together({name: shard for name, shard in held.items() if shard is not None}, self._shards)


class Case:
    """One configuration, trained both ways."""

    def __init__(
        self, stage: int, dtype: str = "float32", accumulation: int = 1, clip: float | None = None, decay: float = 0.0,
        recompute: bool = False, mask: str = "gradient", family: str = "llama", magnitude: str = "per_token",
        steps: int = 3, offload: bool = False, threshold: float = 0.7, masked: bool = True,
        deepspeed: dict[str, Any] | None = None, eps: float = 1e-2, average: str = "tokens",
        skip: bool = True, scope: str = "step", lora: bool = False, grad_dtype: str | None = None, sums: str = "step",
        layers: Any = "blocks", tied_head: str = "error", compact: str = "auto",
    ) -> None:  # fmt: skip
        self.family, self.steps, self.accumulation, self.dtype = family, steps, accumulation, dtype
        self.world, self.rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
        self.micro = 4 // self.world
        self.recipe = Recipe(
            model=ModelConfig(name_or_path="odd"),
            stream=StreamConfig(tasks=(TaskConfig(name="t", format="builtin"),)),
            train=TrainConfig(
                micro_batch_size=self.micro, gradient_accumulation=accumulation, learning_rate=1e-2, eps=eps,
                weight_decay=decay, clip=clip, dtype=dtype, loss_average=average,  # type: ignore[arg-type]
                grad_dtype=grad_dtype,  # type: ignore[arg-type]
            ),
            zero=ZeroConfig(stage=stage, offload=offload, deepspeed=deepspeed or {}),  # type: ignore[arg-type]
            output_dir="unused",
        )  # fmt: skip
        self.config = MiguConfig(
            name="migu",
            mask=mask,
            magnitude=magnitude,
            threshold=threshold,
            first_task="masked" if masked else "dense",  # type: ignore[arg-type]
            skip_rows=skip,
            mask_scope=scope,
            sums=sums,
            layers=tuple(layers) if isinstance(layers, list) else layers,
            tied_head=tied_head,  # type: ignore[arg-type]
            compact=compact,  # type: ignore[arg-type]
        )
        model = (odd_lora if lora else odd_model)(family).to(getattr(torch, dtype))
        dense = copy.deepcopy(model)
        settings = Settings(
            threshold=threshold,
            mask=mask,
            magnitude=magnitude,
            eps=eps,
            weight_decay=decay,
            clip=clip,
            masked=masked,
            sums=sums,
            ahead=scope == "ahead",
            rounds=accumulation if scope == "micro_batch" else 1,
        )
        tracked = tracked_linears(dense, self.config.layers, tied_head == "mask")
        self.dense = Dense(dense, tracked, settings)
        self.local = copy.deepcopy(model)
        """The model before any step, for this rank's own gradients."""
        if recompute:
            enable_activation_checkpointing(model)
        self.migu, self.recorder = Migu(self.config), Recorder()
        method = Composed([self.migu, self.recorder])
        self.engine = TrainingEngine(LoadedModel(model, None, OBJECTIVES[family]), self.recipe, method)  # type: ignore[arg-type]

    def run(self) -> dict[str, Any]:
        """Train `steps` steps; compare after the last one."""
        place = TaskPlace(index=0, name="t", steps=self.steps)
        self.engine.before_task(place)
        start = whole(self.engine.shards, "master")
        report: dict[str, Any] = {"flips": 0, "frozen_moved": 0, "moved_wrong": 0}
        for step in range(self.steps):
            frozen = self.config.mask == "update"
            only_kept = step == 0 and self.recipe.train.weight_decay == 0
            quantities = QUANTITIES if frozen else ("master",) if only_kept else ()
            before = {quantity: whole(self.engine.shards, quantity) for quantity in quantities}
            self._step(step, report)
            after = {quantity: whole(self.engine.shards, quantity) for quantity in quantities}
            if frozen and self.migu.keep:
                report["frozen_moved"] += self._moved_dropped(before, after)
            if only_kept and self.migu.keep:
                report["moved_wrong"] += self._moved_otherwise(before["master"], after["master"])
        self._compare(start, report)
        self.engine.destroy()
        return report

    def _step(self, step: int, report: dict[str, Any]) -> None:
        per_rank = self.micro * self.accumulation
        batch = samples(self.family, per_rank * self.world, seed=step)
        chunks = [batch[r * per_rank : (r + 1) * per_rank] for r in range(self.world)]
        everyone = [micro_batches(self.family, chunk, self.micro) for chunk in chunks]
        targets = sum(b.targets for rank in everyone for b in rank)
        self.engine.train_step(step, everyone[self.rank], targets)
        if step == 0 and self.dtype == "bfloat16":
            report["sum"] = self._error_of_sums(everyone[self.rank], targets)
        every = [b for micro_batch in zip(*everyone, strict=True) for b in micro_batch]
        means = self.recipe.train.loss_average == "micro_batch"
        forwards = [
            (mean_loss(b, self.family, b.targets * len(every) if means else targets), b.token_masks) for b in every
        ]
        layers = self.migu._layers if self.migu.keep else {}
        chosen = {name: self.migu.keep[layer.weight] for name, layer in layers.items()}
        self.dense.step(forwards, chosen=chosen)
        report["flips"] += sum(int((self.dense.keep[name] != keep).sum()) for name, keep in chosen.items())

    def _error_of_sums(self, batches: list[Batch], targets: int) -> float:
        """How far the reduced gradient is from the float32 sum of the same bfloat16 gradients, relative."""
        expected = gradient_sums(self.local, batches, self.family, targets, self.recipe.zero.stage)
        for name, keep in self.migu.keep.items():
            expected[name].view(keep.numel(), -1)[~keep] = 0.0
        return distance(self.recorder.gradients, expected)

    def _moved_dropped(self, before: dict[str, Any], after: dict[str, Any]) -> int:
        """Elements of dropped rows (weight or moment) that changed at all."""
        return sum(
            int((before[quantity][name][~keep] != after[quantity][name][~keep]).sum())
            for quantity in QUANTITIES
            for name, keep in self.migu.keep.items()
        )

    def _moved_otherwise(self, before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> int:
        """Weights in which the rows that moved are not exactly the kept ones.

        All keys' bias shifts all scores of a query alike, which softmax ignores: its gradient is rounding, or zero.
        """
        wrong = 0
        for name, keep in self.migu.keep.items():
            if name.endswith("key.bias"):
                wrong += int((before[name] != after[name])[~keep].any())
                continue
            moved = (before[name] != after[name]).reshape(keep.numel(), -1).any(1)
            wrong += int(not torch.equal(moved, keep))
        return wrong

    def _compare(self, start: dict[str, torch.Tensor], report: dict[str, Any]) -> None:
        end, model = whole(self.engine.shards, "master"), self.engine.model
        movement = max(float((end[n] - start[n]).abs().max()) for n in end)
        report["error"] = max(_error(end[n], self.dense.masters[n].detach()) for n in end)
        report["movement_error"] = max(float((end[n] - self.dense.masters[n].detach()).abs().max()) for n in end)
        report["relative"] = report.pop("movement_error") / movement
        for moment in ("exp_avg", "exp_avg_sq"):
            held = whole(self.engine.shards, moment)
            dense = {n: self.dense.optimizer.state[m][moment] for n, m in self.dense.masters.items()}
            scale = max(float(t.abs().max()) for t in dense.values())
            report[moment] = max(float((held[n] - dense[n]).abs().max()) for n in held) / scale
        report["published"] = _published_error(model, end)
        linears = tracked_linears(model, self.config.layers, self.config.tied_head == "mask")
        report["skipped"] = "forward" in next(iter(linears.values())).__dict__
        report["kept"] = {n: [int(k.sum()), k.numel()] for n, k in self.migu.keep.items()}


def _error(ours: torch.Tensor, dense: torch.Tensor) -> float:
    """Largest difference, relative where a weight is larger than one: float32's spacing grows with the number."""
    return float(((ours - dense).abs() / dense.abs().clamp(min=1.0)).max())


def _published_error(model: torch.nn.Module, masters: dict[str, torch.Tensor]) -> float:
    """Largest difference between the model's own weights and its masters, in the model's precision."""
    from deepspeed.runtime.zero import GatheredParameters

    worst = 0.0
    for name, param in model.named_parameters():
        if name not in masters:  # frozen
            continue
        with GatheredParameters([param]):
            worst = max(worst, float((param.detach() - masters[name].to(param.dtype)).abs().max()))
    return worst
