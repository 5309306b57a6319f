"""Rank side of the tests of `cl_dist.integrate`: the same tasks trained by our engine and by a script of its own."""

from __future__ import annotations

import copy
import tempfile
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

import cl_dist
from cl_dist.benchmarks.integrate_overhead import measure
from cl_dist.config.schema import Recipe
from cl_dist.engine.distributed import join
from cl_dist.engine.engine import TrainingEngine, loss_sum
from cl_dist.engine.settings import build_adamw, deepspeed_config
from cl_dist.integrate.methods import script_recipe
from cl_dist.integrate.session import Session
from cl_dist.methods.composed import Composed, compose
from cl_dist.methods.protocol import TaskPlace
from cl_dist.models.load import LoadedModel
from cl_dist.models.training_mode import enable_activation_checkpointing
from cl_dist.tasks.collate import Batch
from cl_dist.tasks.objectives import OBJECTIVES as CLASSES
from tests.distributed.worlds import OBJECTIVES, micro_batches, odd_lora, odd_model, samples, whole

RATE, EPS, CLIP = 1e-2, 1e-2, 0.05
TASKS, STEPS = 3, 2
Weights = dict[str, torch.Tensor]


def run_cases(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Train every case both ways, in one process group."""
    join(timeout_seconds=120)
    return [Case(**case).run() for case in cases]


def overhead(**settings: Any) -> dict[str, Any]:
    """What benchmarks/integrate_overhead.py measures."""
    join(timeout_seconds=120)
    return measure(**settings)


class Case:
    """One script: what trains in it, the model's family and the methods."""

    def __init__(
        self, script: str, method: list[dict[str, Any]], family: str = "llama", lora: bool = False,
        accumulation: int = 1, stage: int = 0, recompute: bool = False, saved: bool = False, fused: bool = False,
        unused: bool = False,
    ) -> None:  # fmt: skip
        self.script, self.family, self.lora, self.accumulation = script, family, lora, accumulation
        self.recompute, self.saved, self.fused, self.unused = recompute, saved, fused, unused
        self.method, self.stage = method, stage
        self.world, self.rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
        data = script_recipe(method, {}, seed=42, keep_optimizer=False, stage=stage, accumulation=accumulation)
        changed = {"learning_rate": RATE, "eps": EPS, "clip": CLIP, "micro_batch_size": 2, "weight_decay": 0.1}
        self.recipe: Recipe = _replaced(data, **changed)

    def run(self) -> dict[str, Any]:
        """How far weights and masks are apart at the end, and how far training has moved the weights."""
        start = {name: param.detach().clone() for name, param in self._model().named_parameters()}
        expected, masks = self._ours()
        found, seen = self._theirs()
        assert found.keys() == expected.keys()
        return {
            "error": max(float(((found[n] - w).abs() / w.abs().clamp(min=1.0)).max()) for n, w in expected.items()),
            "moved": max(float((w - start[n]).abs().max()) for n, w in expected.items()),
            "masked": sum(len(mask) > 0 for mask in masks),
            "flips": sum(int((a[name] != b[name]).sum()) for a, b in zip(masks, seen, strict=True) for name in a),
            "dropped": sum(int((~keep).sum()) for mask in masks for keep in mask.values()),
        }

    def _model(self) -> torch.nn.Module:
        return (odd_lora if self.lora else odd_model)(self.family)

    def _batches(self, task: int, step: int) -> tuple[list[Batch], int]:
        """This rank's micro-batches of a step, and the targets of the global batch."""
        per_rank = 2 * self.accumulation
        batch = samples(self.family, per_rank * self.world, seed=100 * task + step)
        chunks = [batch[r * per_rank : (r + 1) * per_rank] for r in range(self.world)]
        targets = sum(sample.targets for sample in batch)
        return micro_batches(self.family, chunks[self.rank], 2), targets

    def _ours(self) -> tuple[Weights, list[dict[str, torch.Tensor]]]:
        """Train with our own engine, at ZeRO stage 0 unless the script has another."""
        method = compose(self.recipe.method)
        loaded = LoadedModel(self._model(), None, OBJECTIVES[self.family])  # type: ignore[arg-type]
        engine, masks = TrainingEngine(loaded, self.recipe, method), []
        for task in range(TASKS):
            place = TaskPlace(task, f"t{task}", STEPS)
            if task > 0:
                engine.prepare_task(task)
                engine.shards.reset_optimizer()
            engine.before_task(place)
            for step in range(STEPS):
                engine.train_step(step, *self._batches(task, step))
                masks.append(_masks(method))
            method.after_task(place)
        weights = self._ends_with(engine)
        engine.destroy()
        return weights, masks

    def _ends_with(self, engine: TrainingEngine) -> Weights:
        """What our own engine is compared by: the masters of what it trains."""
        return whole(engine.shards, "master")

    def _theirs(self) -> tuple[Weights, list[dict[str, torch.Tensor]]]:
        """Train in a script of the given kind, and in one that stops inside the second task and goes on."""
        masks: list[dict[str, torch.Tensor]] = []
        model, optimizer, engine, arguments = self._script()
        before: dict[str, Any] = {}
        with tempfile.TemporaryDirectory() as name:
            folder = [name]
            torch.distributed.broadcast_object_list(folder)
            with cl_dist.continual(**arguments, method=self.method) as session:
                for task in range(TASKS):
                    session.task(f"t{task}")
                    for step in range(STEPS):
                        self._step(engine, optimizer, *self._batches(task, step))
                        masks.append(_masks(session.method))
                        if self.saved and (task, step) == (1, 0):
                            session.save(f"{folder[0]}/state")
                            before = copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
                session.end_task()
                weights = whole(session.shards, "master")
                self._check_published(session, model, weights)
            if self.saved:
                assert all(torch.equal(w, weights[n]) for n, w in self._resumed(before, f"{folder[0]}/state").items())
            torch.distributed.barrier()
        return weights, masks

    def _script(self) -> tuple[torch.nn.Module, torch.optim.AdamW, Any, dict[str, Any]]:
        """What a script begins with: model, optimiser, what wraps the model, arguments of `continual`."""
        model = self._model()
        if self.recompute:
            enable_activation_checkpointing(model)
        optimizer = build_adamw(model, self.recipe.train)
        for group in optimizer.param_groups:
            group["lr"] = RATE
        if self.script == "deepspeed":
            import deepspeed

            config = deepspeed_config(self.recipe)
            engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
            return model, optimizer, engine, {"trainer_or_engine": engine}
        if self.script == "accelerate":
            self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=self.accumulation)
            prepared, optimizer = self.accelerator.prepare(model, optimizer)
            return model, optimizer, prepared, {"trainer_or_engine": prepared, "optimizer": optimizer}
        if self.script == "fsdp2":
            mesh = init_device_mesh("cpu", (self.world,))
            # The optimiser steps what `fully_shard` puts in place of the parameters.
            model = fully_shard(model, mesh=mesh)
            optimizer = build_adamw(model, self.recipe.train)
            for group in optimizer.param_groups:
                group["lr"], group["fused"] = RATE, self.fused
        ddp = DistributedDataParallel(model, find_unused_parameters=self.unused) if self.script == "ddp" else model
        passes = {"gradient_accumulation": self.accumulation}
        return model, optimizer, ddp, {"trainer_or_engine": ddp, "optimizer": optimizer, **passes}

    def _resumed(self, before: dict[str, Any], folder: str) -> Weights:
        """The weights of a new script that goes on where the other one saved, with its second task's second step."""
        model, optimizer, engine, arguments = self._script()
        model.load_state_dict(before["model"])
        optimizer.load_state_dict(before["optimizer"])
        with cl_dist.continual(**arguments, method=self.method) as session:
            session.load(folder)
            for task, step in [(1, 1), *((2, step) for step in range(STEPS))]:
                if step == 0:
                    session.task(f"t{task}")
                self._step(engine, optimizer, *self._batches(task, step))
            session.end_task()
            return whole(session.shards, "master")

    def _step(self, engine: Any, optimizer: Any, batches: list[Batch], targets: int) -> None:
        engine.train()
        for number, batch in enumerate(batches):
            last = number == len(batches) - 1
            wait = engine.no_sync() if self.script == "ddp" and not last else nullcontext()
            if self.script == "accelerate":
                wait = self.accelerator.accumulate(engine)
            with wait:
                logits, labels = CLASSES[OBJECTIVES[self.family]].forward(self._runner(engine, batch), batch, True)  # type: ignore[index]
                loss = loss_sum(logits, labels) * (self.world / targets)
                if self.script == "deepspeed":
                    engine.backward(loss * len(batches))
                    engine.step()
                elif self.script == "accelerate":
                    self.accelerator.backward(loss * len(batches))
                    if self.accelerator.sync_gradients:
                        self.accelerator.clip_grad_norm_(engine.parameters(), CLIP)
                    optimizer.step()
                    optimizer.zero_grad()
                else:
                    loss.backward()
        if self.script in ("ddp", "fsdp2", "plain"):
            clip_grad_norm_(engine.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()

    def _runner(self, engine: Any, batch: Batch) -> Any:
        """The forward; with labels where they alone say what of a decoder's input is padding."""
        return partial(engine, labels=batch.labels) if self.family == "t5" else engine

    def _check_published(self, session: Session, model: torch.nn.Module, weights: Weights) -> None:
        from deepspeed.runtime.zero import GatheredParameters

        for name, param in model.named_parameters():
            if name in weights:
                with GatheredParameters([param]):
                    whole_param = param.full_tensor() if isinstance(param, DTensor) else param
                    assert torch.equal(whole_param.detach(), weights[name]), name


def _masks(method: Any) -> dict[str, torch.Tensor]:
    assert isinstance(method, Composed)
    keeps = [each.keep for each in method.methods if hasattr(each, "keep")]
    return {name: keep.clone() for keep in keeps for name, keep in keep.items()}


def _replaced(recipe: Recipe, **train: Any) -> Recipe:
    from dataclasses import replace

    return replace(recipe, train=replace(recipe.train, **train))
