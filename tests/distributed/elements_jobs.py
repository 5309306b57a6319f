"""Rank side of test_elements: GMT and MoFO against a dense oracle, through a state and past a NaN."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from cl_dist.config.schema import ModelConfig, Recipe, StreamConfig, TaskConfig, TrainConfig, ZeroConfig
from cl_dist.engine.distributed import join
from cl_dist.engine.engine import TrainingEngine
from cl_dist.methods.catalogue import built_in, method_class
from cl_dist.methods.composed import Composed
from cl_dist.methods.protocol import TaskPlace
from cl_dist.models.load import LoadedModel
from cl_dist.models.training_mode import enable_activation_checkpointing
from cl_dist.sharding import Shard, ShardView, gather_state_dict
from cl_dist.state.snapshot import load_snapshot, save_snapshot
from tests.distributed.guard_jobs import _different, _poisoned, _state
from tests.distributed.selective_jobs import gpt2
from tests.distributed.worlds import (
    OBJECTIVES,
    mean_loss,
    micro_batches,
    odd_lora,
    odd_model,
    samples,
    together,
    whole,
)
from tests.oracle_elements import Dense, mask_of

STEPS, BATCH = 3, 6
LEARNING_RATE = EPS = 1e-2


def run_cases(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each case how far cl_dist and the oracle are apart, and what was wrong with the elements."""
    join(timeout_seconds=120)
    return [Case(**case).run() for case in cases]


def through_states(cases: list[dict[str, Any]], folder: str) -> list[list[str]]:
    """For each case what differs if it is saved after a step under the first stage and resumed under the second."""
    join(timeout_seconds=120)
    return [_resumed(Path(folder) / str(number), **case) for number, case in enumerate(cases)]


def past_a_nan(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each case what a bad step between two good ones changed, and what differs from never having had it."""
    join(timeout_seconds=120)
    return [_past_a_nan(**case) for case in cases]


class Case:
    """One configuration, trained both ways."""

    def __init__(
        self, method: str, stage: int, family: str = "llama", keep: float = 0.2, parameters: Any = None,
        accumulation: int = 1, clip: float | None = None, decay: float = 0.0, recompute: bool = False,
        dtype: str = "float32", grad_dtype: str | None = None, offload: bool = False,
        deepspeed: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.world, self.rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
        self.family, self.micro, self.accumulation, self.keep = family, BATCH // self.world, accumulation, keep
        self.kind = {"gpt2": "llama", "lora": "llama"}.get(family, family)
        self.exact, self.decay, self.name = dtype == "float32", decay, method.partition("-")[0]
        recipe = Recipe(
            model=ModelConfig(name_or_path="odd"),
            stream=StreamConfig(tasks=(TaskConfig(name="t", format="builtin"),)),
            train=TrainConfig(
                micro_batch_size=self.micro, gradient_accumulation=accumulation, learning_rate=LEARNING_RATE, eps=EPS,
                clip=clip, weight_decay=decay, dtype=dtype, grad_dtype=grad_dtype,  # type: ignore[arg-type]
                max_skipped_steps=1,
            ),
            zero=ZeroConfig(stage=stage, offload=offload, deepspeed=deepspeed or {}),  # type: ignore[arg-type]
            output_dir="unused",
        )  # fmt: skip
        makers = {"gpt2": gpt2, "lora": lambda: odd_lora("llama")}
        model: Any = makers.get(family, lambda: odd_model(family))()
        bare = copy.deepcopy(model)
        if recompute:
            enable_activation_checkpointing(model)
        settings = {"keep": keep, **({"parameters": parameters} if parameters else {})}
        if method == "gmt-update":
            settings["mask"] = "update"
        self.method: Any = method_class(self.name)(built_in()[self.name](name=self.name, **settings))  # type: ignore[misc]
        loaded = LoadedModel(model.to(getattr(torch, dtype)), None, OBJECTIVES[self.kind])  # type: ignore[arg-type]
        self.engine = TrainingEngine(loaded, recipe, Composed([self.method]))
        self.engine.before_task(TaskPlace(0, "t", 10 * STEPS))
        self.dense = Dense(bare, method, keep, self.method.names, LEARNING_RATE, EPS, decay, clip)

    @property
    def shards(self) -> ShardView:
        return self.engine.shards

    def batches(self, step: int) -> tuple[list[list[Any]], int]:
        """Each rank's micro-batches of a step, and their targets: the same samples for any number of ranks."""
        per_rank = self.micro * self.accumulation
        batch = samples(self.kind, per_rank * self.world, seed=step)
        chunks = [batch[r * per_rank : (r + 1) * per_rank] for r in range(self.world)]
        everyone = [micro_batches(self.kind, chunk, self.micro) for chunk in chunks]
        return everyone, sum(b.targets for rank in everyone for b in rank)

    def step(self, step: int) -> Any:
        everyone, targets = self.batches(step)
        return self.engine.train_step(step, everyone[self.rank], targets)

    def gradients(self) -> dict[str, torch.Tensor]:
        """The reduced gradients, whole."""
        held = {name: self.shards.own_gradient(name) for name in self.shards.names}
        return together({name: Shard(s.start, s.data.clone()) for name, s in held.items() if s}, self.shards)

    def run(self) -> dict[str, Any]:
        seen: list[dict[str, torch.Tensor]] = []
        masking = self.method.before_update

        def watched() -> None:
            seen.append(self.gradients())
            masking()
            seen.append(self.gradients())

        self.engine.method.methods[0].before_update = watched  # type: ignore[attr-defined]
        report: dict[str, Any] = {"masks": [], "wrong": [], "other": 0, "apart": 0.0, "moments": 0.0, "moved": []}
        for step in range(STEPS):
            seen.clear()
            before = {quantity: whole(self.shards, quantity) for quantity in ("master", "exp_avg", "exp_avg_sq")}
            self.step(step)
            after = {quantity: whole(self.shards, quantity) for quantity in before}
            everyone, targets = self.batches(step)
            masks = self.dense.step([mean_loss(b, self.kind, targets) for rank in everyone for b in rank])
            for name in self.shards.names:
                self.check(name, *seen, before, after, masks[name], report)
        report["chosen"] = len(self.method.names)
        report["weights"] = self._model_apart()
        self.engine.destroy()
        return report

    def check(
        self, name: str, reduced: dict[str, torch.Tensor], masked: dict[str, torch.Tensor], before: Any, after: Any,
        expected: torch.Tensor, report: dict[str, Any],
    ) -> None:  # fmt: skip
        """Look at what one step did to one parameter."""
        chosen = name in self.method.names
        # By the numbers that this run has itself, in any precision: the right elements were chosen, and nothing else
        # was touched.
        scores = after["exp_avg"][name] if self.name == "mofo" else reduced[name]
        mask = mask_of(scores, self.keep) if chosen else torch.ones_like(scores, dtype=torch.bool)
        gradient = reduced[name] if self.name == "mofo" else torch.where(mask, reduced[name], 0)
        if not torch.equal(masked[name], gradient):
            report["masks"].append(name)
        rate = LEARNING_RATE * (self.decay if scores.ndim >= 2 else 0.0)
        still = before["master"][name] * (1 - rate) if self.name == "mofo" else before["master"][name]
        if self.dense.method != "gmt" and chosen:
            if not torch.equal(after["master"][name][~mask], still[~mask]):
                report["moved"].append(name)
            for which in ("exp_avg", "exp_avg_sq") if self.dense.method == "gmt-update" else ():
                if not torch.equal(after[which][name][~mask], before[which][name][~mask]):
                    report["moved"].append(f"{name} {which}")
        # In float32, also what the oracle does with numbers of its own.
        if self.exact:
            moved = after["master"][name] != still
            if self.dense.method != "gmt" and chosen and not moved[expected & (scores.abs() > 1e-6)].all():
                report["wrong"].append(name)
            # RoBERTa's attention does not depend on the bias of its keys: what is no noise counts.
            report["other"] += int(((mask != expected) & (scores.abs() > 1e-7)).sum())
        truth = self.dense.params[name].detach()
        report["apart"] = max(report["apart"], float((after["master"][name] - truth).abs().max()))
        for which in ("exp_avg", "exp_avg_sq"):
            apart = (after[which][name] - self.dense.moment(name, which)).abs().max()
            report["moments"] = max(report["moments"], float(apart))

    def _model_apart(self) -> float:
        """How far the weights that the model computes with are from the oracle's; rank 0 has them."""
        weights = gather_state_dict(self.engine.model)
        apart = [(weights[n].float() - p.detach()).abs().max() for n, p in self.dense.params.items() if n in weights]
        return max(map(float, apart), default=0.0)


def _resumed(folder: Path, stages: list[int], **settings: Any) -> list[str]:
    case = Case(stage=stages[0], **settings)
    case.step(0)
    engine = case.engine
    save_snapshot(folder, engine.shards, engine.method.state_dict(), moments=True, extra=engine.method.tensors())
    case.step(1)
    expected = whole(case.shards, "master")
    engine.destroy()
    again = Case(stage=stages[1], **settings)
    state = load_snapshot(folder, again.shards, again.engine.method.tensors())
    again.engine.method.tensors_loaded()
    again.engine.method.load_state_dict(state)
    again.step(1)
    found = whole(again.shards, "master")
    again.engine.destroy()
    exact = stages[0] == stages[1]
    return [
        name
        for name in expected
        if not (torch.equal if exact else torch.allclose)(found[name], expected[name])  # type: ignore[operator]
    ]


def _past_a_nan(kind: str, **settings: Any) -> dict[str, Any]:
    case = Case(**settings)
    case.step(0)
    before = _state(case.engine)
    with _poisoned(case.engine, kind):
        skipped = case.step(1).skipped
    after = _state(case.engine)
    case.step(2)
    end = _state(case.engine)
    case.engine.destroy()
    other = Case(**settings)
    other.step(0)
    other.step(2)
    report = {
        "skipped": skipped,
        "changed": _different(before, after),
        "differs": _different(end, _state(other.engine)),
    }
    other.engine.destroy()
    return report
