"""Rank side of test_row_executor: rows that are given, known before backward or only once gradients are reduced."""

from __future__ import annotations

import copy
from typing import Any

import torch

from cl_dist.config.schema import ModelConfig, Recipe, StreamConfig, TaskConfig, TrainConfig, ZeroConfig
from cl_dist.engine.distributed import join
from cl_dist.engine.engine import TrainingEngine
from cl_dist.errors import ClDistError
from cl_dist.methods.composed import Composed
from cl_dist.methods.protocol import Method, TaskPlace
from cl_dist.methods.shared.row_executor import RowExecutor
from cl_dist.models.load import LoadedModel
from cl_dist.models.tracked import tracked_layers
from cl_dist.sharding import Shard, ShardView
from tests.distributed.selective_jobs import gpt2
from tests.distributed.worlds import OBJECTIVES, mean_loss, micro_batches, odd_model, samples, together, whole


class Chooser(Method):
    """Keeps every third row of all layers in the blocks but the first one, which is left out, and of the embedding."""

    def __init__(self, early: bool, dropped: str, forgets: bool = False) -> None:
        super().__init__()
        self.early, self.dropped, self.forgets = early, dropped, forgets

    def attach(self, model: torch.nn.Module, shards: ShardView, train: TrainConfig) -> None:
        self.shards = shards
        layers = tracked_layers(model, "blocks")
        self.executor = RowExecutor(model, shards, layers, dropped=self.dropped, skips=self.early)  # type: ignore[arg-type]
        totals = {layer.weight: layer.layout.total for layer in list(layers.values())[1:]}
        totals |= {layer.bias: layer.layout.total for layer in list(layers.values())[1:] if layer.bias}
        table = next(name for name in shards.names if "embed" in name or "wte" in name)
        totals[table] = shards.shape(table)[0]
        self.keep = {name: torch.arange(total) % 3 == 0 for name, total in totals.items()}

    def before_task(self, place: TaskPlace) -> None:
        self.executor.active = True

    def before_backward(self, loss: torch.Tensor) -> torch.Tensor:
        if self.early and not self.forgets:
            self.executor.choose(self.keep)
        return loss

    def before_update(self) -> None:
        self.executor.apply(None if self.early else self.keep)
        held = {name: self.shards.own_gradient(name) for name in self.shards.names}
        self.gradients = together({n: Shard(s.start, s.data.clone()) for n, s in held.items() if s}, self.shards)

    def after_update(self) -> None:
        self.executor.end_step()

    def detach(self) -> None:
        self.executor.remove()


def run(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each case how far the masked gradient is from the dense one, and what the step did to dropped rows."""
    join(timeout_seconds=120)
    return [_case(**case) for case in cases]


def _engine(stage: int, family: str, accumulation: int, method: Method) -> tuple[TrainingEngine, torch.nn.Module]:
    model: Any = gpt2() if family == "gpt2" else odd_model(family)
    recipe = Recipe(
        model=ModelConfig(name_or_path="odd"),
        stream=StreamConfig(tasks=(TaskConfig(name="t", format="builtin"),)),
        train=TrainConfig(
            micro_batch_size=2, gradient_accumulation=accumulation, learning_rate=1e-2, eps=1e-2, weight_decay=0.1
        ),
        zero=ZeroConfig(stage=stage),  # type: ignore[arg-type]
        output_dir="unused",
    )
    bare = copy.deepcopy(model)
    objective: Any = OBJECTIVES["llama" if family == "gpt2" else family]
    engine = TrainingEngine(LoadedModel(model, None, objective), recipe, Composed([method]))  # type: ignore[arg-type]
    engine.before_task(TaskPlace(0, "t", 1))
    return engine, bare


def _case(stage: int, family: str, early: bool, dropped: str) -> dict[str, Any]:
    accumulation = 1 if early else 2
    method = Chooser(early, dropped)
    engine, bare = _engine(stage, family, accumulation, method)
    kind, rank = "llama" if family == "gpt2" else family, torch.distributed.get_rank()
    batch = samples(kind, 2 * accumulation * torch.distributed.get_world_size())
    everyone = micro_batches(kind, batch, 2)
    mine = everyone[rank * accumulation : (rank + 1) * accumulation]
    targets = sum(each.targets for each in everyone)
    before = whole(engine.shards, "master")
    engine.train_step(0, mine, targets)
    after = whole(engine.shards, "master")
    for each in everyone:
        mean_loss(each, kind, targets)(bare).backward()
    report: dict[str, Any] = {"apart": 0.0, "not zero": [], "moved": []}
    layouts = method.executor._layouts
    for name, parameter in bare.named_parameters():
        truth = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        if name in method.keep:
            axis = int(layouts[name].columns)
            dropped_rows = (~method.keep[name]).nonzero()[:, 0]
            truth = truth.index_fill(axis, dropped_rows, 0.0)
            if method.gradients[name].index_select(axis, dropped_rows).any():
                report["not zero"].append(name)
            pair = [each[name].index_select(axis, dropped_rows) for each in (before, after)]
            if not torch.equal(*pair):
                report["moved"].append(name)
        report["apart"] = max(report["apart"], float((method.gradients[name] - truth).abs().max()))
    report["masked"] = len(method.keep)
    engine.destroy()
    return report


def forgotten() -> list[str]:
    """What happens if rows are to be skipped and nobody chooses them, under stages 0 and 3."""
    join(timeout_seconds=120)
    found = []
    for stage in (0, 3):
        engine, _ = _engine(stage, "llama", 1, Chooser(True, "update", forgets=True))
        batch = micro_batches("llama", samples("llama", 2), 2)
        try:
            engine.train_step(0, batch, batch[0].targets)
        except ClDistError as error:
            found.append(str(error))
    return found
