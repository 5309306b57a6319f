"""Rank side of test_rows: methods that choose rows in every step, against a dense oracle, through a state and past a
NaN.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cl_dist.config.schema import ModelConfig, Recipe, StreamConfig, TaskConfig, TrainConfig, ZeroConfig
from cl_dist.engine.distributed import join
from cl_dist.engine.engine import TrainingEngine
from cl_dist.engine.trainer import Collator, EngineProbe
from cl_dist.errors import BadInput
from cl_dist.methods.catalogue import built_in, method_class
from cl_dist.methods.composed import Composed
from cl_dist.methods.protocol import TaskPlace
from cl_dist.models.load import LoadedModel
from cl_dist.models.training_mode import enable_activation_checkpointing
from cl_dist.seeds import derive_seed
from cl_dist.sharding import gather_state_dict
from cl_dist.state.snapshot import load_snapshot, save_snapshot
from cl_dist.tasks.types import Encoded
from tests.distributed.guard_jobs import _different, _poisoned, _state
from tests.distributed.selective_jobs import gpt2
from tests.distributed.worlds import OBJECTIVES, mean_loss, micro_batches, odd_lora, odd_model, samples, whole
from tests.oracle_rows import Dense, resting_blocks, rows_by_tf_idf

STEPS, BATCH, SEED = 4, 6, 7
LEARNING_RATE = EPS = 1e-2
QUANTITIES = ("master", "exp_avg", "exp_avg_sq")
BLOCKS = {"t5": ("encoder.block", "decoder.block"), "roberta": ("roberta.encoder.layer",), "gpt2": ("transformer.h",)}
TABLES = {
    "t5": "shared.weight",
    "roberta": "roberta.embeddings.word_embeddings.weight",
    "gpt2": "transformer.wte.weight",
}


def run_cases(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each case how far cl_dist and the oracle are apart, and what moved that should not have."""
    join(timeout_seconds=120)
    return [Case(**case).run() for case in cases]


def refused(cases: list[dict[str, Any]]) -> list[str]:
    """The sentence with which each case is refused."""
    join(timeout_seconds=120)
    found = []
    for case in cases:
        try:
            Case(**case)
        except BadInput as refusal:
            found.append(str(refusal))
    return found


def through_states(cases: list[dict[str, Any]], folder: str) -> list[dict[str, Any]]:
    """For each case what differs if it is saved after three steps under a first stage and resumed under a second."""
    join(timeout_seconds=120)
    return [_resumed(Path(folder) / str(number), **case) for number, case in enumerate(cases)]


def past_a_nan(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each case what a bad step between two good ones changed, and what differs from never having had it."""
    join(timeout_seconds=120)
    return [_past_a_nan(**case) for case in cases]


class Case:
    """One configuration, trained both ways."""

    def __init__(
        self, method: str, stage: int, family: str = "llama", accumulation: int = 1, clip: float | None = None,
        decay: float = 0.0, recompute: bool = False, dtype: str = "float32", offload: bool = False,
        deepspeed: dict[str, Any] | None = None, settings: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.world, self.rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
        self.name, self.family, self.micro, self.accumulation = method, family, BATCH // self.world, accumulation
        self.kind = {"gpt2": "llama", "lora": "llama"}.get(family, family)
        self.exact = dtype == "float32"
        recipe = Recipe(
            model=ModelConfig(name_or_path="odd"),
            stream=StreamConfig(tasks=(TaskConfig(name="t", format="builtin"),)),
            train=TrainConfig(
                micro_batch_size=self.micro, gradient_accumulation=accumulation, learning_rate=LEARNING_RATE, eps=EPS,
                clip=clip, weight_decay=decay, dtype=dtype, max_skipped_steps=1, seed=SEED,  # type: ignore[arg-type]
            ),
            zero=ZeroConfig(stage=stage, offload=offload, deepspeed=deepspeed or {}),  # type: ignore[arg-type]
            output_dir="unused",
        )  # fmt: skip
        makers = {"gpt2": gpt2, "lora": lambda: odd_lora("llama")}
        model: Any = makers.get(family, lambda: odd_model(family))()
        bare = copy.deepcopy(model)
        if recompute:
            enable_activation_checkpointing(model)
        defaults = {"lisa": {"blocks": 1, "interval": 2}, "sparse_memory": {"background": "unread", "rows": 9}}
        self.config = built_in()[method](name=method, **{**defaults[method], **(settings or {})})
        self.method: Any = method_class(method)(self.config)  # type: ignore[misc]
        loaded = LoadedModel(model.to(getattr(torch, dtype)), None, OBJECTIVES[self.kind])  # type: ignore[arg-type]
        self.engine = TrainingEngine(loaded, recipe, Composed([self.method]))
        self.background = samples(self.kind, 5, seed=99)
        collator = Collator(self.engine.objective, None, 0, 0)  # type: ignore[arg-type]
        probe = EngineProbe(
            self.engine, collator, (), lambda rank: [], lambda step, rows: None, {"background": self.background}
        )  # type: ignore[arg-type]
        self.place = TaskPlace(3, "t", STEPS, probe=probe)
        self.engine.before_task(self.place)
        self.whole = sum(parameter.numel() for parameter in bare.parameters() if parameter.requires_grad)
        for name, parameter in bare.named_parameters():
            parameter.requires_grad_(name in self.engine.shards.names)
        self.dense = Dense(bare, getattr(self.config, "mask", "update"), LEARNING_RATE, EPS, decay, clip)
        self.gradients: list[str] = []
        for name, parameter in self.engine.model.named_parameters():
            if parameter.requires_grad:
                parameter.register_hook(lambda _, name=name: self.gradients.append(name))

    def samples(self, step: int) -> list[Encoded]:
        return samples(self.kind, self.micro * self.accumulation * self.world, seed=step)

    def batches(self, step: int) -> tuple[list[list[Any]], int]:
        """Each rank's micro-batches of a step, and their targets: the same samples for any number of ranks."""
        batch, per_rank = self.samples(step), self.micro * self.accumulation
        chunks = [batch[r * per_rank : (r + 1) * per_rank] for r in range(self.world)]
        everyone = [micro_batches(self.kind, chunk, self.micro) for chunk in chunks]
        return everyone, sum(b.targets for rank in everyone for b in rank)

    def step(self, step: int) -> Any:
        everyone, targets = self.batches(step)
        return self.engine.train_step(step, everyone[self.rank], targets)

    def keep(self, step: int) -> dict[str, torch.Tensor]:
        """The rows that the step may update, of every parameter that is not updated as a whole."""
        if self.name == "sparse_memory":
            table = TABLES.get(self.family, "model.embed_tokens.weight")
            rows, most = self.dense.params[table].shape[0], self.config.rows
            return {
                table: rows_by_tf_idf(self.looked_up(self.samples(step)), self.looked_up(self.background), rows, most)
            }
        prefix = "base_model.model." if self.family == "lora" else ""
        lists = BLOCKS.get(self.family, ("model.layers",))
        blocks = [f"{prefix}{each}.{number}" for each in lists for number in range(2)]
        seed = derive_seed(SEED, "lisa", self.place.index, step // self.config.interval)
        resting = tuple(f"{name}." for name in resting_blocks(blocks, self.config.blocks, seed))
        params = self.dense.params
        return {n: torch.zeros(p.shape[0], dtype=torch.bool) for n, p in params.items() if n.startswith(resting)}

    def looked_up(self, some: Sequence[Encoded]) -> list[list[int]]:
        """The rows of the table that each sample looks up: T5's decoder reads the answer behind a first token."""
        if self.kind == "t5":
            return [[*each.input_ids, 0, *each.labels[:-1]] for each in some]
        return [list(each.input_ids) for each in some]

    def run(self) -> dict[str, Any]:
        report: dict[str, Any] = {"moved": [], "still": [], "computed": [], "apart": 0.0, "moments": 0.0}
        kept = 0.0
        before = {quantity: whole(self.engine.shards, quantity) for quantity in QUANTITIES}
        for step in range(STEPS):
            self.gradients.clear()
            self.step(step)
            after = {quantity: whole(self.engine.shards, quantity) for quantity in QUANTITIES}
            everyone, targets = self.batches(step)
            keep = self.keep(step)
            self.dense.step([mean_loss(b, self.kind, targets) for rank in everyone for b in rank], keep)
            self.check(keep, before, after, report)
            before = after
            kept += sum(p.numel() * keep[n].double().mean().item() if n in keep else p.numel()
                        for n, p in self.dense.params.items())  # fmt: skip
        report["share"], report["expected share"] = self.method.kept_share(), kept / STEPS / self.whole
        report["weights"] = self._model_apart()
        self.engine.destroy()
        return report

    def check(self, keep: dict[str, torch.Tensor], before: Any, after: Any, report: dict[str, Any]) -> None:
        """Look at what one step did."""
        if self.name == "lisa":
            report["computed"] += [name for name in self.gradients if name in keep]
            report["computed"] += [name for name in self.dense.params if name not in {*keep, *self.gradients}]
        for name, parameter in self.dense.params.items():
            kept = keep.get(name, torch.ones(parameter.shape[0], dtype=torch.bool))
            changed = [(after[which][name] != before[which][name]) for which in QUANTITIES]
            if self.dense.mask == "update" and any(bool(each[~kept].any()) for each in changed):
                report["moved"].append(name)
            if self.exact and kept.any() and name in keep and not changed[0].reshape(len(kept), -1).any(1)[kept].all():
                report["still"].append(name)
            truth = self.dense.held(name)
            scale = truth[0].abs().clamp(min=1.0)
            report["apart"] = max(report["apart"], float(((after["master"][name] - truth[0]).abs() / scale).max()))
            for which, moment in zip(QUANTITIES[1:], truth[1:], strict=True):
                report["moments"] = max(report["moments"], float((after[which][name] - moment).abs().max()))

    def _model_apart(self) -> float:
        """How far the weights that the model computes with are from the oracle's; rank 0 has them."""
        weights = gather_state_dict(self.engine.model)
        apart = [(weights[n].float() - p.detach()).abs().max() for n, p in self.dense.params.items() if n in weights]
        return max(map(float, apart), default=0.0)


def _resumed(folder: Path, stages: list[int], **settings: Any) -> dict[str, Any]:
    """Saved in the middle of an interval, of which the next step draws the same blocks."""
    case = Case(stage=stages[0], **settings)
    for step in range(3):
        case.step(step)
    engine = case.engine
    save_snapshot(folder, engine.shards, engine.method.state_dict(), moments=True, extra=engine.method.tensors())
    for step in range(3, STEPS):
        case.step(step)
    expected, share = whole(case.engine.shards, "master"), case.method.kept_share()
    engine.destroy()
    again = Case(stage=stages[1], **settings)
    state = load_snapshot(folder, again.engine.shards, again.engine.method.tensors())
    again.engine.method.tensors_loaded()
    again.engine.method.load_state_dict(state)
    for step in range(3, STEPS):
        again.step(step)
    found = whole(again.engine.shards, "master")
    shares = [share, again.method.kept_share()]
    again.engine.destroy()
    same: Any = torch.equal if stages[0] == stages[1] else torch.allclose
    return {"differs": [name for name in expected if not same(found[name], expected[name])], "shares": shares}


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
