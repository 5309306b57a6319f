"""Rank side of test_selective: parts of weights that are trained alone, against a dense oracle and through a state."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from cl_dist.config.schema import ModelConfig, Recipe, StreamConfig, TaskConfig, TrainConfig, ZeroConfig
from cl_dist.engine.distributed import join
from cl_dist.engine.engine import TrainingEngine
from cl_dist.engine.trainer import Collator, EngineProbe
from cl_dist.evaluation.inference import evaluating
from cl_dist.methods.composed import Composed
from cl_dist.methods.hft.config import HftConfig
from cl_dist.methods.hft.method import Hft
from cl_dist.methods.protocol import TaskPlace
from cl_dist.methods.s2ft.config import S2ftConfig
from cl_dist.methods.s2ft.method import S2ft
from cl_dist.methods.selective.method import Selective
from cl_dist.methods.ssu.config import SsuConfig
from cl_dist.methods.ssu.inputs import mean_square_inputs
from cl_dist.methods.ssu.method import Ssu
from cl_dist.models.kept_parts import Part, is_kept
from cl_dist.models.load import LoadedModel
from cl_dist.models.training_mode import enable_activation_checkpointing
from cl_dist.seeds import derive_seed
from cl_dist.sharding import gather_state_dict
from cl_dist.state.snapshot import load_snapshot, save_snapshot
from tests.distributed.worlds import OBJECTIVES, VOCABULARY, mean_loss, micro_batches, odd_lora, odd_model, samples
from tests.oracle_selective import Dense, ssu_columns, ssu_scores

TASKS, STEPS, SEED = 2, 2, 5
RELEASED = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}


class Drawn(Selective):
    """Draws rows or columns of every linear layer, and rows of the embedding; trains norms as a whole.

    Args:
        along: Rows, columns, `both`: they take turns, or elements.
        rest: Whether everything else is trained too.
        keep: Share that is kept.
    """

    def __init__(self, along: str = "rows", rest: bool = True, keep: float = 0.3, embedding: bool = True) -> None:
        super().__init__()
        self.along, self.rest, self.keep, self.embedding = along, rest, keep, embedding

    def parts(self, model: torch.nn.Module) -> Sequence[Part]:
        found, seen = [], set()
        for name, module in model.named_modules():
            weight = module._parameters.get("weight")
            if weight is None or not weight.requires_grad or (weight.ndim != 2 and not hasattr(weight, "ds_id")):
                continue
            shape = getattr(weight, "ds_shape", weight.shape)
            table = isinstance(module, torch.nn.Embedding)
            if len(shape) != 2 or id(weight) in seen:
                continue
            seen.add(id(weight))
            if table and not self.embedding:
                continue
            tied = table and any(
                other is not module and other._parameters.get("weight") is weight for other in model.modules()
            )
            along = self.along if self.along != "both" else ("rows", "columns")[len(found) % 2]
            along = "rows" if (table or tied) and along == "columns" else along
            stored = type(module).__name__ == "Conv1D"
            size = shape.numel() if along == "elements" else shape[int((along == "columns") != stored)]
            found.append(Part(f"{name}.weight", along, max(1, round(self.keep * size))))  # type: ignore[arg-type]
        return found

    def choose(self, place: TaskPlace) -> Mapping[str, torch.Tensor]:
        return {part.part.weight: self.draw(place.index, part.part.weight, part.size, part.part.count)
                for part in self._parts}  # fmt: skip

    def draw(self, task: int, name: str, size: int, count: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(derive_seed(SEED, "draw", task, name))
        return torch.randperm(size, generator=generator)[:count].sort().values

    def trains_rest(self, name: str) -> bool:
        return self.rest


def gpt2(seed: int = 0) -> torch.nn.Module:
    """GPT-2 stores its weights transposed, and ties head and embedding."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=33, n_layer=2, n_head=3, n_positions=64, resid_pdrop=0, embd_pdrop=0,
        attn_pdrop=0, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def run_cases(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each case how far cl_dist and the oracle are apart, and which dropped elements moved."""
    join(timeout_seconds=120)
    return [Case(**case).against_the_oracle() for case in cases]


def through_a_state(folder: str, stages: list[int], settings: dict[str, Any]) -> dict[str, Any]:
    """Save inside the second task under the first stage; load under every one, go on, and compare with going on.

    The loaded ones have other calibration samples, so that whoever measured them again would choose something else.
    """
    join(timeout_seconds=120)
    case = Case(stages[0], **settings)
    case.train_task(0)
    case.begin(1)
    case.step(1, 0)
    engine = case.engine
    save_snapshot(Path(folder), engine.shards, engine.method.state_dict(), moments=True, extra=engine.method.tensors())
    case.step(1, 1)
    expected = case.whole_weights(1)
    engine.destroy()
    apart = {}
    for stage in stages:
        loaded = Case(stage, **settings, calibration=7)
        loaded.engine.prepare_task(1)
        state = load_snapshot(Path(folder), loaded.engine.shards, loaded.engine.method.tensors())
        loaded.engine.method.tensors_loaded()
        loaded.engine.before_task(loaded.place(1))
        loaded.engine.method.load_state_dict(state)
        loaded.step(1, 1, dense=False)
        weights = loaded.whole_weights(1)
        apart[str(stage)] = max([0.0, *(float((weights[name] - expected[name]).abs().max()) for name in expected)])
        loaded.engine.destroy()
    return apart


def disagreeing() -> list[list[int]]:
    """What every rank trains if each chooses something else."""
    join(timeout_seconds=120)
    case = Case(1)
    rank = torch.distributed.get_rank()
    case.method.draw = lambda task, name, size, count: torch.arange(count) + rank
    case.engine.before_task(case.place(0))
    case.method.before_step(0)
    everyone: list[Any] = [None] * case.world
    torch.distributed.all_gather_object(everyone, [part.indices.tolist() for part in case.method._parts])
    return everyone


def calibrated(stages: list[int]) -> list[str]:
    """A digest of the inputs that source-shielded updates measure, under each stage."""
    join(timeout_seconds=120)
    digests = []
    for stage in stages:
        case = Case(stage, selector="ssu", deepspeed=RELEASED if stage == 3 else None)
        layers = {part.part.weight: part.layers[0] for part in case.method._parts}
        case.engine.before_task(case.place(0))
        inputs = mean_square_inputs(layers, case.calibration, case.place(0).probe)
        digests.append(hashlib.sha256(torch.cat(list(inputs.values())).numpy().tobytes()).hexdigest())
        case.engine.destroy()
    return digests


def half(stages: list[int], folder: str) -> list[dict[str, Any]]:
    """Half fine-tuning under each stage: distance from the oracle, what was frozen, and what a resume between the tasks
    changes.
    """
    join(timeout_seconds=120)
    return [_half(stage, Path(folder) / str(stage)) for stage in stages]


def _half(stage: int, folder: Path) -> dict[str, Any]:
    case = Case(stage, deepspeed=RELEASED if stage == 3 else None, clip=0.1, selector="hft")
    report = case.against_the_oracle(keep=True)
    engine = case.engine
    report["frozen"] = [sorted(case.method.frozen(case.dense.model, task)) for task in range(TASKS)]
    save_snapshot(folder, engine.shards, engine.method.state_dict(), moments=False, extra=engine.method.tensors())
    case.begin(2)
    case.step(2, 0, dense=False)
    expected = case.whole_weights(2)
    engine.destroy()
    again = Case(stage, clip=0.1, selector="hft")
    again.engine.prepare_task(1)
    state = load_snapshot(folder, again.engine.shards, again.engine.method.tensors())
    again.engine.method.tensors_loaded()
    again.engine.method.load_state_dict(state)
    again.begin(2)
    again.step(2, 0, dense=False)
    weights = again.whole_weights(2)
    again.engine.destroy()
    report["resumed"] = [name for name in expected if not torch.equal(weights[name], expected[name])]
    return report


class Case:
    """One configuration."""

    def __init__(
        self, stage: int, family: str = "llama", along: str = "rows", rest: bool = True, accumulation: int = 1,
        clip: float | None = None, decay: float = 0.0, recompute: bool = False, dtype: str = "float32",
        offload: bool = False, deepspeed: dict[str, Any] | None = None, embedding: bool = True,
        selector: str = "drawn", calibration: int = 99, method: Any = None, keep: float = 0.3,
    ) -> None:  # fmt: skip
        self.world, self.rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
        self.family, self.micro, self.accumulation = family, 6 // self.world, accumulation
        self.kind = {"gpt2": "llama", "lora": "llama"}.get(family, family)
        recipe = Recipe(
            model=ModelConfig(name_or_path="odd"),
            stream=StreamConfig(tasks=tuple(TaskConfig(name=f"t{n}", format="builtin") for n in range(TASKS + 1))),
            train=TrainConfig(
                micro_batch_size=self.micro, gradient_accumulation=accumulation, learning_rate=1e-2, eps=1e-2,
                clip=clip, weight_decay=decay, dtype=dtype,  # type: ignore[arg-type]
            ),
            zero=ZeroConfig(stage=stage, offload=offload, deepspeed=deepspeed or {}),  # type: ignore[arg-type]
            output_dir="unused",
        )  # fmt: skip
        makers = {"gpt2": gpt2, "lora": lambda: odd_lora("llama")}
        model: Any = makers.get(family, lambda: odd_model(family))()
        bare = copy.deepcopy(model)
        if recompute:
            enable_activation_checkpointing(model)
        self.method: Any = method or self._method(selector, Drawn(along, rest, keep, embedding))
        trainable = {name for name, parameter in bare.named_parameters() if parameter.requires_grad}
        loaded = LoadedModel(model.to(getattr(torch, dtype)), None, OBJECTIVES[self.kind])  # type: ignore[arg-type]
        self.engine = TrainingEngine(loaded, recipe, Composed([self.method]))
        self.selector, self._masks = selector, dict[int, dict[str, torch.Tensor]]()
        self.calibration = samples(self.kind, 5, seed=calibration)
        collator = Collator(self.engine.objective, None, 0, 0)  # type: ignore[arg-type]
        self._probe = EngineProbe(
            self.engine, collator, (), lambda rank: [], lambda step, rows: None, {"calibration": self.calibration}
        )  # type: ignore[arg-type]
        self.trainable, self.exact, self.dtype = trainable, dtype == "float32", getattr(torch, dtype)
        self.flipped = 0.0
        """How far, relative to the cut, the scores are from it of columns that only one choice trains."""
        self.dense = Dense(bare, lr=1e-2, eps=1e-2, weight_decay=decay, clip=clip)

    def _method(self, selector: str, drawn: Drawn) -> Any:
        if selector == "hft":
            return Hft(HftConfig(name="hft"))
        if selector == "ssu":
            return Ssu(SsuConfig(name="ssu", calibration="unread", keep=0.4, samples=5))
        if selector == "s2ft":
            matrices = ("value", "output", "up", "gate", "down")
            heads = 0.5 if self.family != "gpt2" else 0.0
            return S2ft(S2ftConfig(name="s2ft", heads=heads, channels=0.3, matrices=matrices))
        return drawn

    def place(self, task: int) -> TaskPlace:
        return TaskPlace(task, f"t{task}", STEPS, probe=self._probe)

    def masks(self, task: int) -> dict[str, torch.Tensor]:
        """What the oracle trains in a task; asked first when the task begins."""
        if task not in self._masks:
            self._masks[task] = self._chosen(task)
        return self._masks[task]

    def _chosen(self, task: int) -> dict[str, torch.Tensor]:
        masks, frozen = {}, self.method.frozen(self.dense.model, task)
        parts = {part.part.weight: part for part in self.method._parts}
        for name, parameter in self.dense.params.items():
            whole = name not in frozen and self.method.trains_rest(name)
            masks[name] = torch.full(parameter.shape, name in self.trainable and whole)
        if self.selector == "ssu":
            inputs = [micro_batches(self.kind, [sample], 1)[0].inputs for sample in self.calibration]
            if self.exact:
                return masks | ssu_columns(self.dense.model, inputs, list(parts), self.method.config.keep)
            self._compare_choice(task, copy.deepcopy(self.dense.model).to(self.dtype), inputs)
        for name, part in parts.items():
            if self.selector in ("s2ft", "ssu"):
                chosen = self.method.choose(self.place(task))[name]
            else:
                chosen = self.method.draw(task, name, part.size, part.part.count)
            masks[name] = torch.zeros_like(masks[name])
            part.by_unit(masks[name]).index_fill_(part.axis, chosen, True)
            bias = name.removesuffix("weight") + "bias"
            if part.bias:
                masks[bias] = torch.zeros_like(masks[bias]).index_fill_(0, chosen, True)
        return masks

    def _compare_choice(self, task: int, model: torch.nn.Module, inputs: list[Any]) -> None:
        """In low precision two correct programs may order columns with nearly equal scores differently."""
        chosen = self.method.choose(self.place(task))
        for name, score in ssu_scores(model, inputs, list(chosen)).items():
            ours = torch.zeros(len(score), dtype=torch.bool).index_fill_(0, chosen[name].cpu(), True)
            cut = score.sort().values[len(chosen[name]) - 1]
            others = score[ours != (score <= cut)]
            self.flipped = max([self.flipped, *((others - cut).abs() / cut).tolist()])

    def begin(self, task: int) -> None:
        self.engine.prepare_task(task)
        self.engine.shards.reset_optimizer()
        self.engine.before_task(self.place(task))
        self.dense.start_task(self.masks(task))

    def train_task(self, task: int) -> None:
        self.begin(task)
        for step in range(STEPS):
            self.step(task, step)
        self.engine.method.after_task(self.place(task))

    def step(self, task: int, step: int, dense: bool = True) -> None:
        per_rank = self.micro * self.accumulation
        batch = samples(self.kind, per_rank * self.world, seed=10 * task + step)
        chunks = [batch[r * per_rank : (r + 1) * per_rank] for r in range(self.world)]
        everyone = [micro_batches(self.kind, chunk, self.micro) for chunk in chunks]
        targets = sum(b.targets for rank in everyone for b in rank)
        self.engine.train_step(step, everyone[self.rank], targets)
        if dense:
            self.dense.step([mean_loss(b, self.kind, targets) for rank in everyone for b in rank])

    def whole_weights(self, task: int) -> dict[str, torch.Tensor]:
        """The model's weights after the task, on rank 0, under their own names."""
        self.engine.method.after_task(self.place(task))
        weights = gather_state_dict(self.engine.model)
        return {name: weight for name, weight in weights.items() if name in self.dense.params}

    def against_the_oracle(self, keep: bool = False) -> dict[str, Any]:
        report: dict[str, Any] = {"apart": 0.0, "moved": [], "still": [], "outputs": 0.0}
        start = {name: parameter.detach().clone() for name, parameter in self.dense.params.items()}
        before = {name: weight.to(self.dtype).float() for name, weight in start.items()}
        for task in range(TASKS):
            self.train_task(task)
            outputs = self._outputs()
            weights = self.whole_weights(task)
            masks = self.masks(task)
            for name, weight in weights.items():
                truth = self.dense.params[name].detach()
                report["apart"] = max(report["apart"], float((weight.float() - truth).abs().max()))
                if not torch.equal(weight.float()[~masks[name]], before[name][~masks[name]]):
                    report["moved"].append(name)
                # A step is smaller than the distance between two bfloat16 numbers where a norm's weights are one.
                visible = self.exact or name in {part.part.weight for part in self.method._parts}
                if visible and masks[name].any() and torch.equal(weight.float(), before[name]):
                    report["still"].append(name)
            report["outputs"] = max(report["outputs"], outputs)
            before = {name: weight.float().clone() for name, weight in weights.items()}
        report["trained"] = sum(self.engine.shards.numel(name) for name in self.engine.shards.names)
        report["flipped"] = self.flipped
        report["dense"] = sum(p.numel() for n, p in start.items() if n in self.trainable)
        report["kept"] = sum(is_kept(name) for name in self.engine.shards.names)
        if not keep:
            self.engine.destroy()
        return report

    def _outputs(self) -> float:
        """How far the engine's outputs are from the oracle's, as evaluation computes them between two tasks."""
        apart = 0.0
        with evaluating(self.engine.model), torch.no_grad():
            for seed in (7, 8):
                batch = micro_batches(self.kind, samples(self.kind, 2, seed), 2)[0]
                ours = self.engine.model(**batch.inputs).logits.float()
                apart = max(apart, float((ours - self.dense.model(**batch.inputs).logits).abs().max()))
        return apart
