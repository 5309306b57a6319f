"""Rank side of test_sift: the elements with the largest first gradient, against a dense run that sorts whole ones."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from cl_dist.engine.distributed import join
from cl_dist.engine.trainer import TaskTrainer
from cl_dist.errors import JobFailed
from cl_dist.methods.protocol import TaskPlace
from cl_dist.methods.sift.config import SiftConfig
from cl_dist.methods.sift.method import Sift
from cl_dist.sharding import gather_state_dict
from cl_dist.state.snapshot import load_snapshot, save_snapshot
from tests.distributed.selective_jobs import STEPS, TASKS, Case
from tests.distributed.worlds import mean_loss, micro_batches, samples


def run_cases(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each case how far cl_dist and the oracle are apart, and how many elements are others than the oracle's."""
    join(timeout_seconds=120)
    return [SiftCase(**case).against_the_oracle() for case in cases]


def through_states(stages: list[list[int]], folder: str) -> list[float]:
    """Save within the second task under the first stage, load under the second, go on: how far the weights are from
    those of going on at once.
    """
    join(timeout_seconds=120)
    return [_resumed(pair, Path(folder) / str(number)) for number, pair in enumerate(stages)]


def not_finite() -> str:
    """What is said to a weight's first gradient that is infinite although the loss is not."""
    join(timeout_seconds=120)
    case = SiftCase(2)
    case.begin(0)
    try:
        with _poisoned_weight(case):
            case.step(0, 0, dense=False)
    except JobFailed as error:
        return str(error)
    return ""


class SiftCase(Case):
    """One configuration."""

    def __init__(
        self, stage: int, keep: float = 0.05, layers: Any = "blocks", rest: str = "frozen", **case: Any
    ) -> None:
        config = SiftConfig(name="sift", keep=keep, layers=layers, rest=rest)  # type: ignore[arg-type]
        super().__init__(stage, method=Sift(config), **case)
        # As many samples as a global batch: the first gradient is that of all of them, in whatever order.
        count = self.micro * self.world * self.accumulation
        self.tasks = [samples(self.kind, count, seed=100 + task) for task in range(TASKS)]

    def begin(self, task: int) -> None:
        self.engine.prepare_task(task)
        self.engine.shards.reset_optimizer()
        self.engine.before_task(self.place(task))
        self.chosen = self.largest(task)
        self.dense.start_task(self.chosen)

    def place(self, task: int) -> TaskPlace:
        tokenizer: Any = None
        trainer = TaskTrainer(self.engine, self.tasks[task], tokenizer, 0, task, tasks=self.tasks[: task + 1])
        return TaskPlace(task, f"t{task}", STEPS, probe=trainer.probe)

    def largest(self, task: int) -> dict[str, torch.Tensor]:
        """The oracle: the whole gradient, sorted."""
        [batch] = micro_batches(self.kind, self.tasks[task], len(self.tasks[task]))
        model = self.dense.model
        model.zero_grad()
        mean_loss(batch, self.kind, batch.targets)(model).backward()
        trains = self.method.config.rest == "trained"
        masks = {name: torch.full(p.shape, trains and name in self.trainable) for name, p in self.dense.params.items()}
        for part in self.method._parts:
            gradient = self.dense.params[part.part.weight].grad
            assert gradient is not None
            count = min(int(self.method.config.keep * gradient.numel()) + 1, gradient.numel())
            order = gradient.abs().reshape(-1).sort(descending=True, stable=True).indices[:count]
            masks[part.part.weight] = torch.zeros(gradient.numel(), dtype=torch.bool).index_fill_(0, order, True)
            masks[part.part.weight] = masks[part.part.weight].view(gradient.shape)
        return masks

    def masks(self, task: int) -> dict[str, torch.Tensor]:
        return self.chosen

    def against_the_oracle(self, keep: bool = False) -> dict[str, Any]:
        report = super().against_the_oracle(keep=True)
        for part in self.method._parts:
            found = torch.zeros(part.size, dtype=torch.bool)
            found[part.indices.long()] = True
            other = int((found != self.chosen[part.part.weight].reshape(-1)).sum())
            report["other"] = report.get("other", 0) + other / 2 / part.part.count / len(self.method._parts)
        self.engine.destroy()
        return report


def _resumed(stages: list[int], folder: Path) -> float:
    case = SiftCase(stages[0])
    case.train_task(0)
    case.begin(1)
    case.step(1, 0, dense=False)
    engine = case.engine
    save_snapshot(folder, engine.shards, engine.method.state_dict(), moments=True, extra=engine.method.tensors())
    case.step(1, 1, dense=False)
    expected = _weights(case)
    engine.destroy()
    again = SiftCase(stages[1])
    again.engine.prepare_task(1)
    state = load_snapshot(folder, again.engine.shards, again.engine.method.tensors())
    again.engine.method.tensors_loaded()
    again.engine.before_task(again.place(1))
    again.engine.method.load_state_dict(state)
    again.step(1, 1, dense=False)
    found = _weights(again)
    again.engine.destroy()
    return max([0.0, *(float((found[name] - expected[name]).abs().max()) for name in expected)])


def _weights(case: Case) -> dict[str, torch.Tensor]:
    case.engine.method.after_task(TaskPlace(1, "t1", STEPS))
    return gather_state_dict(case.engine.model)


class _poisoned_weight:
    """Inside, one element of the gradient of one weight is infinite on the last rank."""

    def __init__(self, case: SiftCase) -> None:
        [part] = [each for each in case.method._parts if "layers.1.mlp.down_proj" in each.part.weight]
        [layer] = part.layers
        self._layer = layer

    def __enter__(self) -> None:
        self._handle = None
        if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
            self._handle = self._layer.register_full_backward_pre_hook(
                lambda _, grads: (grads[0].clone().fill_(math.inf), *grads[1:])
            )

    def __exit__(self, *_: Any) -> None:
        if self._handle is not None:
            self._handle.remove()
