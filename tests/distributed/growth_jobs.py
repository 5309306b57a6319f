"""Rank side of test_growth: adapters that grow from task to task, against a dense oracle and through a saved state."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from cl_dist.config.schema import LoraConfig, ModelConfig, Recipe, StreamConfig, TaskConfig, TrainConfig, ZeroConfig
from cl_dist.engine.distributed import join
from cl_dist.engine.engine import TrainingEngine
from cl_dist.engine.trainer import TaskTrainer
from cl_dist.evaluation.inference import evaluating
from cl_dist.methods.agem.config import AgemConfig
from cl_dist.methods.agem.method import Agem
from cl_dist.methods.composed import Composed, compose
from cl_dist.methods.config import MethodConfig
from cl_dist.methods.inclora.config import IncLoraConfig
from cl_dist.methods.lwf.config import LwfConfig
from cl_dist.methods.lwf.method import Lwf
from cl_dist.methods.lwf.responses import respond
from cl_dist.methods.migu.config import MiguConfig
from cl_dist.methods.olora.config import OLoraConfig
from cl_dist.methods.protocol import TaskPlace
from cl_dist.models.load import LoadedModel
from cl_dist.models.lora import add_lora, frozen_adapters, in_adapter
from cl_dist.sharding import Shard, gather_state_dict, whole_parameters
from cl_dist.state.snapshot import load_snapshot, save_snapshot
from cl_dist.tasks.types import IGNORE, Encoded
from tests.distributed.worlds import OBJECTIVES, mean_loss, micro_batches, odd_model, samples, together, whole
from tests.oracle_olora import Dense

TASKS = 3
STEPS = 2
LORA = LoraConfig(r=3, alpha=6.0)
"""Three: odd, so that pieces of the flattened matrices end inside rows."""
SEED = 1


def run_cases(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each case how far cl_dist and the oracle are apart, and whether an old adapter has changed."""
    join(timeout_seconds=120)
    return [Case(**case).against_the_oracle() for case in cases]


def compositions(stage: int) -> dict[str, list[float]]:
    """The newest adapter's weights after two tasks of O-LoRA and MIGU: MIGU masking in backward, masking after the
    reduction, and before the penalty is added.
    """
    join(timeout_seconds=120)
    olora = OLoraConfig(name="olora", lambda1=0.05)
    skipping, zeroing = (MiguConfig(name="migu", skip_rows=skip) for skip in (True, False))
    orders = {"skipped": (olora, skipping), "zeroed": (olora, zeroing), "penalty last": (skipping, olora)}
    weights = {}
    for name, order in orders.items():
        case = Case(stage, methods=order)
        for index in range(2):
            case.train_task(index)
        masters = whole(case.engine.shards, "master")
        weights[name] = torch.cat([tensor.reshape(-1) for tensor in masters.values()]).tolist()
        case.engine.destroy()
    return weights


def guarded(stages: list[int]) -> list[dict[str, float]]:
    """For each stage how far what LwF records and A-GEM measures behind a rebuilt engine is from the dense oracle's."""
    join(timeout_seconds=120)
    return [_guarded(stage) for stage in stages]


def _guarded(stage: int) -> dict[str, float]:
    """One task of IncLoRA with both, and one step of the next: `responses` and `reference` are errors, `moved` is how
    far the model's responses are from the recorded ones after that step.
    """
    guards = (LwfConfig(name="lwf", top_k=None), AgemConfig(name="agem", memory_ratio=0.5))
    case = Case(stage, lambda1=0.0, methods=(IncLoraConfig(name="inclora"), *guards))
    assert isinstance(case.engine.method, Composed)
    _, lwf, agem = case.engine.method.methods
    assert isinstance(lwf, Lwf)
    assert isinstance(agem, Agem)
    case.train_task(0)
    case.hand_over()
    tasks = [samples("llama", 8, seed) for seed in (100, 101)]
    trainer = TaskTrainer(case.engine, tasks[1], None, 0, 1, tasks=tasks)  # type: ignore[arg-type]
    case.engine.prepare_task(1)
    case.engine.shards.reset_optimizer()
    case.engine.before_task(TaskPlace(1, "t", trainer.steps, probe=trainer.probe))
    trainer.step(0)
    report = {"responses": _from_recorded(case.dense, lwf, tasks[1])}
    case.hand_over()
    report["moved"] = _from_recorded(case.dense, lwf, tasks[1])
    report["reference"] = _reference_apart(case, agem)
    case.engine.destroy()
    return report


def _from_recorded(dense: Dense, lwf: Lwf, task: list[Encoded]) -> float:
    """Largest distance of the oracle's log-probabilities from those that this rank has recorded."""
    assert len(lwf._old) == len(task) // torch.distributed.get_world_size()
    apart = 0.0
    for key, recorded in lwf._old.items():
        [batch] = micro_batches("llama", [task[key]], 1)
        with torch.no_grad():
            logits = dense.model(**batch.inputs).logits[:, :-1][batch.labels[:, 1:] != IGNORE]
        apart = max(apart, float((respond(logits, 2.0, None).log_probs - recorded.log_probs).abs().max()))
    return apart


def _reference_apart(case: Case, agem: Agem) -> float:
    """Largest error of the next step's reference gradient, relative to the largest element of the oracle's."""
    starts: dict[str, int] = {}
    keep, shards = agem._keep, case.engine.shards

    def noting() -> None:
        keep()
        starts.update((name, shard.start) for name in shards.names if (shard := shards.gradient(name)) is not None)

    agem._keep = noting  # type: ignore[method-assign]
    agem.before_step(1)
    reference = together({name: Shard(starts[name], data) for name, data in agem._reference.items()}, shards)
    memory = list(agem._memory)
    assert len(memory) == 4, "all of it is drawn, in whatever order"
    [batch] = micro_batches("llama", memory, len(memory))
    loss = mean_loss(batch, "llama", sum(sample.targets for sample in memory))(case.dense.model)
    truth = dict(zip(_names(case), torch.autograd.grad(loss, case.dense.newest()), strict=True))
    ours = {(_layer(name), ".lora_A." in name): tensor for name, tensor in reference.items()}
    scale = max(float(tensor.abs().max()) for tensor in truth.values())
    return max(float((ours[name] - tensor).abs().max()) for name, tensor in truth.items()) / scale


def _names(case: Case) -> list[tuple[str, bool]]:
    """Layer and kind of the oracle's newest matrices, in its order."""
    return [(layer, is_a) for layer in case.dense.pairs for is_a in (True, False)]


def through_a_state(folder: str, dtype: str, stages: list[int]) -> dict[str, dict[str, Any]]:
    """Save inside the last task under the first stage; load under every one, go on, and compare with going on."""
    join(timeout_seconds=120)
    case = Case(stages[0], dtype=dtype, methods=(OLoraConfig(name="olora"),))
    for index in range(TASKS - 1):
        case.train_task(index)
    case.train_task(TASKS - 1, steps=1)
    engine = case.engine
    save_snapshot(Path(folder), engine.shards, {}, moments=True, extra=engine.method.tensors())
    frozen = _frozen(engine)
    case.step(TASKS - 1, 1)
    expected = whole(engine.shards, "master")
    engine.destroy()
    reports = {}
    for stage in stages:
        loaded = Case(stage, dtype=dtype, methods=(OLoraConfig(name="olora"),))
        if stage == stages[-1]:
            loaded.engine.prepare_task(TASKS)  # one too many: prepared for a later task than the state is from
        loaded.engine.prepare_task(TASKS - 1)
        load_snapshot(Path(folder), loaded.engine.shards, loaded.engine.method.tensors())
        loaded.engine.method.tensors_loaded()
        restored = _frozen(loaded.engine)
        loaded.engine.before_task(TaskPlace(TASKS - 1, "t", STEPS))
        loaded.step(TASKS - 1, 1)
        masters = whole(loaded.engine.shards, "master")
        loaded.engine.destroy()
        reports[str(stage)] = {
            "frozen": len(restored),
            "not_restored": [name for name in frozen if not torch.equal(frozen[name], restored[name])],
            "apart": max(float((masters[name] - expected[name]).abs().max()) for name in expected),
        }
    return reports


def _frozen(engine: TrainingEngine) -> dict[str, torch.Tensor]:
    """What this rank computes with."""
    names = frozen_adapters(engine.model)  # type: ignore[arg-type]
    parameters = whole_parameters(engine.model, names)
    return {name: parameter.clone() for name, parameter in zip(names, parameters, strict=True)}


class Case:
    """One configuration."""

    def __init__(
        self, stage: int, lambda1: float = 0.05, lambda2: float = 0.0, accumulation: int = 1, clip: float | None = None,
        dtype: str = "float32", offload: bool = False, deepspeed: dict[str, Any] | None = None,
        by_task: dict[str, dict[str, float]] | None = None, methods: tuple[MethodConfig, ...] | None = None,
    ) -> None:  # fmt: skip
        self.world, self.rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
        self.micro, self.accumulation = 4 // self.world, accumulation
        self.by_task, self.lambda1, self.lambda2 = by_task or {}, lambda1, lambda2
        penalty = OLoraConfig(name="olora", lambda1=lambda1, lambda2=lambda2, by_task=self.by_task)
        plain = lambda1 == lambda2 == 0
        self.methods = methods or ((IncLoraConfig(name="inclora") if plain else penalty),)
        recipe = Recipe(
            model=ModelConfig(name_or_path="odd", lora=LORA),
            stream=StreamConfig(tasks=tuple(TaskConfig(name=f"t{each}", format="builtin") for each in range(TASKS))),
            method=self.methods,
            train=TrainConfig(
                micro_batch_size=self.micro, gradient_accumulation=accumulation, learning_rate=1e-2, eps=1e-2,
                clip=clip, dtype=dtype,  # type: ignore[arg-type]
            ),
            zero=ZeroConfig(stage=stage, offload=offload, deepspeed=deepspeed or {}),  # type: ignore[arg-type]
            output_dir="unused",
        )  # fmt: skip
        base: Any = odd_model("llama")
        bare = copy.deepcopy(base)
        model = add_lora(base, LORA, "causal_lm", SEED).to(getattr(torch, dtype))
        loaded = LoadedModel(model, None, OBJECTIVES["llama"])  # type: ignore[arg-type]
        self.engine = TrainingEngine(loaded, recipe, compose(self.methods))
        self.layers = [_layer(name) for name in self.engine.shards.names if ".lora_A." in name]
        self.dense = Dense(bare, self.layers, LORA.alpha / LORA.r, lambda1, lambda2, lr=1e-2, eps=1e-2, clip=clip)

    def against_the_oracle(self) -> dict[str, Any]:
        report: dict[str, Any] = {"apart": 0.0, "changed": [], "trained": [], "unpublished": 0.0, "still": []}
        kept: dict[str, torch.Tensor] = {}
        for index in range(TASKS):
            before = self._start(index)
            for step in range(STEPS):
                self.step(index, step, dense=True)
            masters = whole(self.engine.shards, "master")
            report["apart"] = max(report["apart"], self._apart(masters))
            report["still"] += [name for name in masters if torch.equal(masters[name], before[name])]
            weights = gather_state_dict(self.engine.model, wanted=in_adapter)
            report["changed"] += [name for name in kept if not torch.equal(kept[name], weights[name])]
            published = {name: weights[name].float() for name in masters if name in weights}  # nothing but on rank 0
            report["unpublished"] = max([report["unpublished"], *_differences(published, masters)])
            report["trained"].append(len(masters))
            kept = weights
            self._look()
        report["adapters"] = len(kept) // (2 * len(self.layers))
        self.engine.destroy()
        return report

    def _look(self) -> None:
        """As evaluation does between two tasks: stage 3 records another order of the modules."""
        with evaluating(self.engine.model):
            for seed in (7, 8):
                self.engine.model(**micro_batches("llama", samples("llama", 2, seed), 2)[0].inputs)

    def train_task(self, index: int, steps: int = STEPS) -> None:
        """The first `steps` steps of a task, without the oracle."""
        self._begin(index)
        for step in range(steps):
            self.step(index, step)

    def _begin(self, index: int) -> None:
        self.engine.prepare_task(index)
        self.engine.shards.reset_optimizer()
        self.engine.before_task(TaskPlace(index, f"t{index}", STEPS))
        own = self.by_task.get(f"t{index}", {})
        self.dense.lambda1, self.dense.lambda2 = (
            own.get(name, usual) for name, usual in (("lambda1", self.lambda1), ("lambda2", self.lambda2))
        )

    def _start(self, index: int) -> dict[str, torch.Tensor]:
        """Begin a task on both sides with the same new matrices."""
        self._begin(index)
        return self.hand_over()

    def hand_over(self) -> dict[str, torch.Tensor]:
        """Let the oracle have the newest matrices as the engine has them now, in whole."""
        masters = whole(self.engine.shards, "master")
        by_layer = {(_layer(name), ".lora_A." in name): tensor for name, tensor in masters.items()}
        self.dense.start_task({layer: (by_layer[layer, True], by_layer[layer, False]) for layer in self.layers})
        return masters

    def step(self, task: int, step: int, dense: bool = False) -> None:
        per_rank = self.micro * self.accumulation
        batch = samples("llama", per_rank * self.world, seed=10 * task + step)
        chunks = [batch[r * per_rank : (r + 1) * per_rank] for r in range(self.world)]
        everyone = [micro_batches("llama", chunk, self.micro) for chunk in chunks]
        targets = sum(b.targets for rank in everyone for b in rank)
        self.engine.train_step(step, everyone[self.rank], targets)
        if dense:
            self.dense.step([mean_loss(b, "llama", targets) for rank in everyone for b in rank])

    def _apart(self, masters: dict[str, torch.Tensor]) -> float:
        truth = {}
        for name in masters:
            a, b = self.dense.pairs[_layer(name)][-1]
            truth[name] = (a if ".lora_A." in name else b).detach()
        return float(torch.tensor(_differences(truth, masters)).max())  # NaN stays NaN


def _differences(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> list[float]:
    return [float((tensor - second[name]).abs().max()) for name, tensor in first.items()]


def _layer(name: str) -> str:
    """The linear layer that a LoRA matrix belongs to, as the model without adapters calls it."""
    return name.partition(".lora_")[0].removeprefix("base_model.model.")
