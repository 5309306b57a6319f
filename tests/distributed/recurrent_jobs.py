"""Rank side of test_recurrent_kif: many cases in one start of the ranks, each trained with cl_dist and densely."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch

from cl_dist.config.schema import LoraConfig, ModelConfig, Recipe, StreamConfig, TaskConfig, TrainConfig, ZeroConfig
from cl_dist.engine.distributed import join
from cl_dist.engine.engine import TrainingEngine
from cl_dist.methods.composed import Composed
from cl_dist.methods.protocol import TaskPlace
from cl_dist.methods.recurrent_kif.config import RecurrentKifConfig
from cl_dist.methods.recurrent_kif.method import RecurrentKif
from cl_dist.models.load import LoadedModel
from cl_dist.models.lora import add_lora
from cl_dist.tasks.collate import Batch
from cl_dist.tasks.plan import Cycles
from tests.distributed.kif_jobs import RANKS, Recorder, _apart, _relative, _unit, _unpublished, together
from tests.distributed.worlds import mean_loss, micro_batches, odd_model, samples, whole
from tests.oracle_kif import DenseRecurrent, Settings

OWN, INNER, OUTER = 3, 2, 1
"""Two steps, one on the past, one step, one on the past."""
RATES = {"all_steps": (1.0, 4 / 5, 3 / 5, 2 / 5, 1 / 5), "inner_steps": (1.0, 2 / 3, 1 / 3, 1 / 3, 0.0)}
"""Linear schedules over five steps, and over the three own ones: a step on the past has the next own one's rate."""


def run_cases(cases: list[dict[str, Any]]) -> list[dict[str, float]]:
    """For each case how far cl_dist and the oracle are apart."""
    join(timeout_seconds=120)
    return [Case(**case).run() for case in cases]


class Case:
    """One configuration, trained both ways: a first task without a memory, and a second one in cycles."""

    def __init__(
        self, stage: int, units: str, order: str, dtype: str = "float32", accumulation: int = 1, offload: bool = False,
        clip: float | None = None, orthogonal: float = 0.0, outer_learning_rate: float | None = None,
        schedule_over: str | None = None, fuse_last_cycle: bool = True, outer_loss_weight: float = 1.0, **kept: Any,
    ) -> None:  # fmt: skip
        self.accumulation, self.outer_lr, self.outer_weight = accumulation, outer_learning_rate, outer_loss_weight
        self.cycles = Cycles(OWN, INNER, OUTER, fuse_last_cycle, schedule_over != "inner_steps")
        self.rates = (1.0,) * 5 if schedule_over is None else RATES[schedule_over]
        self.world, self.rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
        self.micro = 4 // self.world
        adapters = LoraConfig(r=RANKS, alpha=RANKS) if units == "rank" else None
        config = RecurrentKifConfig(
            name="recurrent_kif", units=units, order=order, threshold=40.0, orthogonal=orthogonal,  # type: ignore[arg-type]
            outer_learning_rate=outer_learning_rate, outer_loss_weight=outer_loss_weight,
            schedule_over=schedule_over or "all_steps", fuse_last_cycle=fuse_last_cycle, **kept,  # type: ignore[arg-type]
        )  # fmt: skip
        recipe = Recipe(
            model=ModelConfig(name_or_path="odd", lora=adapters),
            stream=StreamConfig(tasks=(TaskConfig(name="t", format="builtin"),)),
            method=(config,),
            train=TrainConfig(
                micro_batch_size=self.micro, gradient_accumulation=accumulation, learning_rate=1e-2, eps=1e-2,
                clip=clip, dtype=dtype, schedule="linear" if schedule_over else "constant",  # type: ignore[arg-type]
            ),
            zero=ZeroConfig(stage=stage, offload=offload),  # type: ignore[arg-type]
            output_dir="unused",
        )  # fmt: skip
        model: Any = odd_model("llama")
        if adapters is not None:
            model = add_lora(model, adapters, "causal_lm", seed=1)
        model = model.to(getattr(torch, dtype))
        settings = Settings(
            units, order, "hard", clip=clip, orthogonal=orthogonal, threshold=40.0, weight_new=0.4, weight_old=0.6,
            **kept,
        )  # fmt: skip
        self.dense = DenseRecurrent(copy.deepcopy(model), settings)
        self.given = DenseRecurrent(copy.deepcopy(model), settings)
        """The oracle again, given the weights and gradients that the ranks have."""
        self.method, self.recorder = RecurrentKif(config), Recorder()
        self.engine = TrainingEngine(
            LoadedModel(model, None, "causal_lm"), recipe, Composed([self.method, self.recorder])
        )  # type: ignore[arg-type]

    def run(self) -> dict[str, float]:
        """Train the stream; the errors at its end."""
        self._begin(TaskPlace(0, "t", 2))
        for step in range(2):
            self._set_rate(1.0 - step / 2 if self.rates[1] < 1.0 else 1.0)
            self._step(step, self.dense.step)
        self.engine.method.after_task(TaskPlace(0, "t", 2))
        first = self._errors_of_first_task()
        place = TaskPlace(1, "t", self.cycles.steps, self.cycles)
        self._begin(place)
        fused = 0.0
        for number in range(2):
            fused = max(fused, self._cycle(number, place))
        self.engine.destroy()
        return {**first, "fused": fused, **self._scores()}

    def _begin(self, place: TaskPlace) -> None:
        self.engine.shards.reset_optimizer()
        self.engine.before_task(place)
        self.dense.start_task()
        self.given.start_task()

    def _errors_of_first_task(self) -> dict[str, float]:
        shares = self.method.scores["share_new"] - 1.0, self.method.scores["share_old"]
        masters = whole(self.engine.shards, "master")
        return {"first": _apart(masters, self.dense.masters), "shares": float(max(t.abs().max() for t in shares))}

    def _cycle(self, number: int, place: TaskPlace) -> float:
        """One cycle; how far apart the weights are after its fusion."""
        self.dense.start_cycle()
        self.given.start_cycle()
        own = [0, 1] if number == 0 else [3]
        for step in own:
            self._set_rate(self.rates[step])
            self._step(step, self.dense.step)
        if number == 0 or self.cycles.last:
            self._turn_and_fuse(own[-1] + 1)
        if number == 1:
            self.engine.method.after_task(place)
        masters = whole(self.engine.shards, "master")
        return max(_apart(masters, self.dense.masters), _unpublished(self.engine.model, masters))

    def _turn_and_fuse(self, step: int) -> None:
        """The cycle's step on the past, `step`, and on the oracle's side its fusion."""
        self.dense.turn()
        self.given.turn()
        self.given.swap()
        self._set_rate(self.rates[step])
        self._step(step, self._past_step)
        self.given.swap()
        self.dense.end_cycle()
        self.given.end_cycle()

    def _set_rate(self, share: float) -> None:
        assert self.dense.optimizer is not None
        self.dense.optimizer.param_groups[0]["lr"] = share * self.dense.settings.lr

    def _past_step(self, losses: Sequence[Callable[[torch.nn.Module], torch.Tensor]]) -> None:
        assert self.dense.optimizer is not None
        if self.outer_lr is not None:
            self.dense.optimizer.param_groups[0]["lr"] = self.outer_lr
        self.dense.past_step([lambda model, of=loss_of: self.outer_weight * of(model) for loss_of in losses])

    def _step(self, step: int, dense: Callable[[Sequence[Callable[[torch.nn.Module], torch.Tensor]]], None]) -> None:
        per_rank = self.micro * self.accumulation
        batch = samples("llama", per_rank * self.world, seed=step)
        chunks = [batch[r * per_rank : (r + 1) * per_rank] for r in range(self.world)]
        everyone: list[list[Batch]] = [micro_batches("llama", chunk, self.micro) for chunk in chunks]
        targets = sum(b.targets for rank in everyone for b in rank)
        self.engine.train_step(step, everyone[self.rank], targets)
        dense([mean_loss(b, "llama", targets) for rank in everyone for b in rank])
        self.recorder.given_to(self.given)

    def _scores(self) -> dict[str, float]:
        dense, given, scores = self.dense, self.given, self.method.scores
        units = [_unit(slices) for slices in self.method.units.as_json().values()]

        def column(values: list[float]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.float64)

        return {
            "current": _relative(scores["current"], column([dense.scores[u] for u in units])),
            "past": _relative(scores["accumulated"], column([dense.past_scores[u] for u in units])),
            "given current": _relative(scores["current"], column([given.scores[u] for u in units])),
            "given past": _relative(scores["accumulated"], column([given.past_scores[u] for u in units])),
            "share_new": _relative(scores["share_new"], column([dense.pairs[u][0] for u in units])),
            "share_old": _relative(scores["share_old"], column([dense.pairs[u][1] for u in units])),
            "kinds": float(len(set(dense.pairs.values()))),
            "left": max(
                float(tensor.abs().max())
                for quantity in ("smoothed", "past_uncertainty")
                for tensor in together(self.method.tensors()[quantity], self.engine.shards).values()
            ),
        }
