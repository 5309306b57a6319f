"""Rank side of test_penalties: EWC, LwF and A-GEM, many cases in one start of the ranks, each trained densely too."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from cl_dist.config.schema import LoraConfig, ModelConfig, Recipe, StreamConfig, TaskConfig, TrainConfig, ZeroConfig
from cl_dist.engine.distributed import join
from cl_dist.engine.engine import TrainingEngine
from cl_dist.engine.trainer import TaskTrainer
from cl_dist.errors import BadInput
from cl_dist.methods.agem.config import AgemConfig
from cl_dist.methods.agem.method import Agem
from cl_dist.methods.composed import Composed
from cl_dist.methods.ewc.config import EwcConfig
from cl_dist.methods.ewc.method import Ewc
from cl_dist.methods.kif.config import KifConfig
from cl_dist.methods.kif.method import Kif
from cl_dist.methods.lwf.config import LwfConfig
from cl_dist.methods.lwf.method import Lwf
from cl_dist.methods.migu.config import MiguConfig
from cl_dist.methods.migu.method import Migu
from cl_dist.methods.protocol import Method, TaskPlace
from cl_dist.models.load import LoadedModel
from cl_dist.models.lora import add_lora
from cl_dist.models.training_mode import enable_activation_checkpointing
from cl_dist.tasks.types import IGNORE, Encoded
from tests.distributed.guard_jobs import _different, _state
from tests.distributed.kif_jobs import _apart, _unpublished, together
from tests.distributed.worlds import OBJECTIVES, mean_loss, micro_batches, odd_lora, odd_model, samples, whole
from tests.oracle_penalties import Dense, Loss, project

TASKS = 3
"""For EWC, whose penalties add up; the others look back one task."""


def run_all(cases: list[dict[str, Any]], quiet: list[dict[str, Any]], pairs: list[dict[str, Any]]) -> dict[str, Any]:
    """All in one start of the ranks.

    `cases`: how far cl_dist and the oracle are apart. `quiet`: what a measurement has changed. `pairs`: with MIGU, how
    far skipping rows and zeroing them are apart. And what is refused.
    """
    join(timeout_seconds=120)
    return {
        "cases": [Case(**case).run() for case in cases],
        "quiet": [_quiet(**case) for case in quiet],
        "pairs": [_pair(**case) for case in pairs],
        "refused": [_refused(build_method("ewc", fisher_batch=5)), _refused(build_method("agem", memory_batch=5))],
    }


def build_method(name: str, **settings: Any) -> Method:
    """One of the three, by its name in a recipe."""
    if name == "ewc":
        return Ewc(EwcConfig(name="ewc", **settings))
    return Lwf(LwfConfig(name="lwf", **settings)) if name == "lwf" else Agem(AgemConfig(name="agem", **settings))


def build_engine(
    methods: list[Method], model: torch.nn.Module, family: str, stage: int, dtype: str = "float32",
    accumulation: int = 1, clip: float | None = None, offload: bool = False, deepspeed: dict[str, Any] | None = None,
) -> TrainingEngine:  # fmt: skip
    """An engine whose global batch is four samples, or four for each micro-batch of a step."""
    recipe = Recipe(
        model=ModelConfig(name_or_path="odd"),
        stream=StreamConfig(tasks=tuple(TaskConfig(name=f"t{number}", format="builtin") for number in range(TASKS))),
        train=TrainConfig(
            micro_batch_size=4 // torch.distributed.get_world_size(), gradient_accumulation=accumulation,
            learning_rate=1e-2, eps=1e-2, clip=clip, dtype=dtype,  # type: ignore[arg-type]
        ),
        zero=ZeroConfig(stage=stage, offload=offload, deepspeed=deepspeed or {}),  # type: ignore[arg-type]
        output_dir="unused",
    )  # fmt: skip
    return TrainingEngine(LoadedModel(model, None, OBJECTIVES[family]), recipe, Composed(methods))  # type: ignore[arg-type]


def _refused(method: Method) -> str:
    """What is said to more samples than the four of a step."""
    try:
        build_engine([method], odd_model("llama"), "llama", stage=2)
    except BadInput as error:
        return str(error)
    return ""


def stream(family: str, accumulation: int) -> list[list[Encoded]]:
    """Tasks of two batches and a half."""
    return [samples(family, 10 * accumulation, seed=index) for index in range(TASKS)]


def begin(
    engine: TrainingEngine,
    tasks: Sequence[Sequence[Encoded]],
    index: int,
    data: Mapping[str, Sequence[Encoded]] | None = None,
    resumed: bool = False,
) -> tuple[TaskTrainer, TaskPlace]:
    """Start a task as the coordinator does; `resumed`: with the moments that a saved state has brought."""
    tokenizer: Any = None
    trainer = TaskTrainer(engine, tasks[index], tokenizer, 0, index, tasks=tasks[: index + 1], data=data)
    place = TaskPlace(index, "t", trainer.steps, probe=trainer.probe)
    if not resumed:
        engine.shards.reset_optimizer()
    engine.before_task(place)
    return trainer, place


class Case:
    """One configuration, trained both ways."""

    def __init__(
        self, method: str, stage: int, family: str = "llama", lora: bool = False, dtype: str = "float32",
        accumulation: int = 1, clip: float | None = None, offload: bool = False, recompute: bool = False,
        deepspeed: dict[str, Any] | None = None, **settings: Any,
    ) -> None:  # fmt: skip
        self.family, self.name = family, method
        self.tasks = stream(family, accumulation)
        model = (odd_lora if lora else odd_model)(family).to(getattr(torch, dtype))
        self.dense = Dense(copy.deepcopy(model), lr=1e-2, eps=1e-2, clip=clip)
        if recompute:
            enable_activation_checkpointing(model)
        self.method = build_method(method, **settings)
        self.config: Any = self.method.config  # type: ignore[attr-defined]
        self.online = self.config.gamma if method == "ewc" and self.config.variant == "online" else None
        self.engine = build_engine(self.methods(), model, family, stage, dtype, accumulation, clip, offload, deepspeed)
        self.measured: list[list[Encoded]] = []
        self.projected = 0
        self.norms = 0.0

    def methods(self) -> list[Method]:
        """What the engine is built with."""
        return [self.method]

    def run(self) -> dict[str, Any]:
        """Train the stream; the largest of each error over the tasks."""
        worst: dict[str, float] = {}
        for index in range(TASKS if self.name == "ewc" else 2):
            for quantity, error in self._task(index).items():
                worst[quantity] = max(worst.get(quantity, 0.0), error)
        report = {
            **worst,
            "norms": self.norms,
            "measured": [[sample.index for sample in some] for some in self.measured],
        }
        if isinstance(self.method, Agem):
            report["projected"] = [self.method.projected, self.projected]
        self.engine.destroy()
        return report

    def _task(self, index: int) -> dict[str, float]:
        trainer, place = begin(self.engine, self.tasks, index)
        self._listen(place)
        self.dense.start_task()
        for step in range(trainer.steps):
            trainer.step(step)
            self.norms = max(self.norms, _norms_apart(self.engine))
            batch = [self.tasks[index][number] for number in trainer.samples(step)]
            self._dense_step(index, batch)
        errors = {"trained": _apart(whole(self.engine.shards, "master"), self.dense.masters)}
        before = len(self.measured)
        self.engine.method.after_task(place)
        masters = whole(self.engine.shards, "master")
        errors["unpublished"] = _unpublished(self.engine.model, masters)
        if isinstance(self.method, Ewc):
            errors.update(self._end_ewc(self.method, self.measured[before:]))
        return errors

    def _listen(self, place: TaskPlace) -> None:
        """Write down which samples a gradient is measured on."""
        probe: Any = place.probe
        original = probe.gradient

        def listening(drawn: Sequence[Encoded], take: Callable[[], None], **more: Any) -> bool:
            self.measured.append(list(drawn))
            return bool(original(drawn, take, **more))

        probe.gradient = listening

    def _dense_step(self, index: int, batch: list[Encoded]) -> None:
        targets = sum(sample.targets for sample in batch)
        loss = self._loss(batch, targets)
        if self.name == "lwf" and index > 0:
            loss = self._with_distillation(loss, batch, targets)
        gradient = self.dense.gradient(loss)
        if self.name == "ewc":
            gradient = self.dense.with_penalty(gradient, self.config.weight, self.online)
        if self.name == "agem" and index > 0:
            drawn = self.measured[-1]
            reference = self.dense.gradient(self._loss(drawn, sum(sample.targets for sample in drawn)))
            gradient, changed = project(gradient, reference)
            self.projected += changed
        self.dense.step(gradient)

    def _loss(self, batch: list[Encoded], targets: int) -> Loss:
        [whole_batch] = micro_batches(self.family, batch, len(batch))
        return mean_loss(whole_batch, self.family, targets)  # type: ignore[no-any-return]

    def _with_distillation(self, loss: Loss, batch: list[Encoded], targets: int) -> Loss:
        [collated] = micro_batches(self.family, batch, len(batch))

        def logits_of(model: torch.nn.Module) -> torch.Tensor:
            logits, labels = model(**collated.inputs).logits, collated.labels
            if self.family == "llama":
                logits, labels = logits[:, :-1], labels[:, 1:]
            return logits[labels != IGNORE]

        divergence = self.dense.distillation(logits_of, self.config.temperature, self.config.top_k)
        scale = self.config.weight * self.config.temperature**2 / targets
        return lambda model: loss(model) + scale * divergence(model)

    def _end_ewc(self, method: Ewc, drawn: list[list[Encoded]]) -> dict[str, float]:
        each = [self._loss([sample], -1) for some in drawn for sample in some]
        with self.dense.at(whole(self.engine.shards, "master")):
            self.dense.end_task(each, self.config.fisher_batch)
        sums = self.dense.fisher(self.online)
        held = {quantity: together(shards, self.engine.shards) for quantity, shards in method.tensors().items()}
        if self.online is not None:
            anchor = self.dense.past[-1][1]
        else:
            weighted = {n: sum(f[n].double() * a[n] for f, a in self.dense.past) for n in sums}
            anchor = {n: torch.where(sums[n] > 0, weighted[n] / sums[n], held["anchor"][n]) for n in sums}
        return {"fisher": _apart(held["fisher"], sums), "anchor": _apart(held["anchor"], anchor)}


def _norms_apart(engine: TrainingEngine) -> float:
    """How far apart the norms are that the ranks have clipped by; 0 where DeepSpeed does not tell."""
    norms: list[Any] = [None] * torch.distributed.get_world_size()
    norm = engine._engine.get_global_grad_norm()
    torch.distributed.all_gather_object(norms, None if norm is None else float(norm))
    return 0.0 if norm is None else max(norms) - min(norms)


def _quiet(stage: int, accumulation: int = 1, **settings: Any) -> dict[str, Any]:
    """Measure between two steps under methods that would notice, on a model with dropout; what has changed then, and
    at the end of a run that goes on.
    """

    def engine() -> TrainingEngine:
        config = LoraConfig(r=3, alpha=6.0, dropout=0.2)
        model = add_lora(odd_model("llama"), config, "causal_lm", 0).to(  # type: ignore[arg-type]
            getattr(torch, settings.get("dtype", "float32"))
        )
        migu = Migu(MiguConfig(name="migu", mask="update", first_task="masked"))
        kif = Kif(KifConfig(name="kif", units="matrix"))
        return build_engine([migu, kif], model, "llama", stage, accumulation=accumulation, clip=0.1, **settings)

    tasks, seen, report = stream("llama", accumulation), [0], {}
    ends = []
    for measures in (True, False):
        one = engine()
        trainer, place = begin(one, tasks, 0)
        trainer.step(0)
        if measures:
            before, rate = _state(one), one.shards.layout.inner.param_groups[0]["lr"]
            report["gradient"] = _measure(one, place, tasks[0], seen)
            report["changed"] = _different(before, _state(one))
            report["rate"] = one.shards.layout.inner.param_groups[0]["lr"] - rate
            assert isinstance(one.method, Composed)
            migu: Any = one.method.methods[0]
            report["sums"] = float(migu._sums.flat.abs().sum())
        trainer.step(1)
        ends.append(_state(one))
        one.destroy()
    return {**report, "differs": _different(*ends), "responses": seen[0]}


def _measure(engine: TrainingEngine, place: TaskPlace, drawn: Sequence[Encoded], seen: list[int]) -> float:
    """Ask for two gradients and for all responses; returns how large the second gradient is, of all ranks."""
    assert place.probe is not None
    norms: list[float] = []

    def look() -> None:
        held = [shard.data for name in engine.shards.names if (shard := engine.shards.own_gradient(name)) is not None]
        norms.append(float(sum(data.double().square().sum() for data in held)))

    def count(batch: Any, logits: torch.Tensor, labels: torch.Tensor) -> None:
        seen[0] += sum(key >= 0 for key in batch.keys)

    place.probe.gradient(drawn[:1], look, mean=False, what="one")
    place.probe.gradient(drawn[:3], look, mean=True, what="three")
    place.probe.responses(count)
    return norms[1]


def _pair(method: dict[str, Any], stage: int, first: bool = True) -> dict[str, Any]:
    """Two tasks of `method` with MIGU, whose rows are skipped or zeroed: how far apart they end, and how far the
    method has led from MIGU alone.
    """
    ends = []
    for skip in (True, False, None):
        methods = [Migu(MiguConfig(name="migu", skip_rows=bool(skip), first_task="dense"))]
        if skip is not None:
            methods.insert(0 if first else 1, build_method(**method))  # type: ignore[arg-type]
        engine = build_engine(methods, odd_model("llama"), "llama", stage)  # type: ignore[arg-type]
        tasks = stream("llama", 1)
        for index in range(2):
            trainer, place = begin(engine, tasks, index)
            for step in range(trainer.steps):
                trainer.step(step)
            engine.method.after_task(place)
        ends.append(whole(engine.shards, "master"))
        engine.destroy()
    return {"apart": _apart(ends[0], ends[1]), "effect": _apart(ends[0], ends[2])}
