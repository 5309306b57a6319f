#!/usr/bin/env python3
"""What `cl-dist plan` predicts against what training does: `cl-dist bench plan-accuracy`, or this file as a script.

Every case trains a small Llama for a few steps on ranks on this machine. Memory that is held is counted tensor by
tensor: what the model, the optimiser, DeepSpeed and the methods hold. The peak of a step is what PyTorch's allocator
reports in a profile, on top of all live tensors. Collectives are counted where torch hands them to the process group.
"""

from __future__ import annotations

import gc
import os
from argparse import Namespace
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from cl_dist.benchmarks.command import main
from cl_dist.benchmarks.ranks import measure_on_ranks
from cl_dist.benchmarks.report import Column, Entry
from cl_dist.config.schema import LoraConfig, ModelConfig, Recipe, StreamConfig, TaskConfig, TrainConfig, ZeroConfig
from cl_dist.engine.engine import TrainingEngine
from cl_dist.errors import ClDistError
from cl_dist.methods.catalogue import built_in
from cl_dist.methods.composed import compose
from cl_dist.methods.protocol import Method, TaskPlace
from cl_dist.models.layer_kinds import TrackedLayer
from cl_dist.models.load import LoadedModel
from cl_dist.models.lora import add_lora
from cl_dist.models.training_mode import enable_activation_checkpointing
from cl_dist.planning.memory import plan_memory
from cl_dist.planning.setup import Setup
from cl_dist.planning.shape import describe_model
from cl_dist.planning.trace import trace_step
from cl_dist.planning.wire import plan_wire
from cl_dist.sharding import ShardView
from cl_dist.tasks.collate import Batch, collate
from cl_dist.tasks.types import IGNORE, Encoded

VOCABULARY, LAYERS, HEADS = 2048, 4, 4
ANSWER, SAMPLES = 32, 2
WARM_UP = 2
"""Steps before the measured one, so that everything that is allocated once is there."""
PARTS = ("weights", "master", "moments", "gradients", "method")
SMALL = {
    "stage3_prefetch_bucket_size": 200_000,
    "stage3_max_reuse_distance": 400_000,
    "stage3_param_persistence_threshold": 1_000,
}
"""Settings of stage 3 that release and gather a small model's weights as the defaults do with a large model's."""
BUCKET = 600_000
"""Elements; several buckets make up a gradient."""


@dataclass(frozen=True)
class Case:
    """One training. All values are JSON."""

    stage: int
    world: int
    lora: int | None = None
    method: str = "sequential"
    dtype: str = "float32"
    accumulation: int = 1
    checkpointing: bool = False
    offload: bool = False
    defaults: bool = False
    """Whether stage 3 keeps DeepSpeed's own schedule of gathers."""
    update: bool = False
    """Whether MIGU's dropped rows keep their weights (`mask: update`)."""

    @property
    def name(self) -> str:
        """As it stands in the table."""
        parts = [f"ZeRO {self.stage}", "LoRA" if self.lora else "full", self.method]
        parts += [self.dtype] if self.dtype != "float32" else []
        parts += [f"{self.accumulation} micro-batches"] if self.accumulation > 1 else []
        flags = {"checkpointing": self.checkpointing, "offload": self.offload, "default schedule": self.defaults}
        flags |= {"mask: update": self.update}
        return ", ".join([*parts, *(flag for flag, on in flags.items() if on)])


def matrix(world: int) -> list[Case]:
    """Every stage, full and LoRA, with each method, and variations of other settings."""
    methods, ranks = ("sequential", "migu", "kif"), (None, 8)
    cases = [Case(stage, world, lora, method) for stage in range(4) for lora in ranks for method in methods]
    for stage in range(4):
        cases += [
            Case(stage, world, dtype="bfloat16"),
            Case(stage, world, accumulation=2),
            Case(stage, world, checkpointing=True),
        ]
    cases += [Case(stage, world, offload=True) for stage in (1, 2, 3)]
    cases += [Case(2, world, None, method) for method in ("ewc", "lwf", "recurrent_kif")]
    return [*cases, Case(3, world, 8, checkpointing=True), Case(3, world, defaults=True)]


def recipe_of(case: Case, tokens: int) -> Recipe:
    """The case's recipe."""
    zero: dict[str, Any] = {"reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET} if case.stage else {}
    if case.stage == 3:
        del zero["allgather_bucket_size"]
        zero |= {} if case.defaults else SMALL
    return Recipe(
        model=ModelConfig(name_or_path="a small Llama", lora=LoraConfig(r=case.lora) if case.lora else None),
        stream=StreamConfig(tasks=tuple(TaskConfig(name=name, format="builtin") for name in ("first", "second"))),
        method=(built_in()[case.method](name=case.method, **({"mask": "update"} if case.update else {})),),
        train=TrainConfig(
            micro_batch_size=SAMPLES,
            gradient_accumulation=case.accumulation,
            max_length=tokens,
            max_target_length=ANSWER,
            dtype=case.dtype,  # type: ignore[arg-type]
            activation_checkpointing=case.checkpointing,
        ),
        zero=ZeroConfig(
            stage=case.stage,  # type: ignore[arg-type]
            offload=case.offload,
            deepspeed={"zero_optimization": zero} if zero else {},
        ),
        output_dir="unused",
    )


def llama(hidden: int, tokens: int) -> LlamaConfig:
    """The model's configuration."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=tokens,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


# Predicted


def predict(case: Case, hidden: int, tokens: int) -> dict[str, Any]:
    """What the plan says: bytes by component, of the peak, and of each collective."""
    setup = Setup(recipe_of(case, tokens), 1, case.world, "cpu", answer=ANSWER + 1)
    shape = describe_model(setup.recipe, llama(hidden, tokens))
    trace = trace_step(setup, shape)
    memory, wire = plan_memory(setup, shape, trace), plan_wire(setup, shape, trace)
    held = Counter(memory.held) + Counter(memory.host)
    known = {"weights", "master", "moments", "gradients", "communication buffers"}
    collectives = Counter[str]()
    for each in (*wire.step, *wire.methods_step):
        collectives[each.kind] += each.bytes
    return {
        **{part: held[part] for part in ("weights", "master", "moments")},
        "gradients": memory.gradients,
        "method": sum(size for name, size in held.items() if name not in known),
        "peak": memory.device_peak + memory.host_total,
        "phase": memory.phase,
        "wire": dict(collectives),
    }


# Measured


class Collectives(TorchDispatchMode):
    """Counts the bytes of every collective, where torch hands it to the process group (the operators `c10d::*`)."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "c10d":
            self._count(func._schema.name.removeprefix("c10d::"), args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: Sequence[Any]) -> None:
        for kind, prefixes in _OPERATORS.items():
            if name.startswith(prefixes):
                # The first argument is the output; a reduce-scatter's input, the second, is the whole.
                self.bytes[kind] += _bytes(args[1] if kind == "reduce_scatter" else args[0])
                return
        if name != "barrier" and not name.startswith("monitored"):
            raise ClDistError(f"the collective {name} is not counted")


_OPERATORS = {
    "all_reduce": ("allreduce",),
    "all_gather": ("allgather", "_allgather"),
    "reduce_scatter": ("reduce_scatter", "_reduce_scatter"),
    "broadcast": ("broadcast",),
    "reduce": ("reduce_",),
}


def _bytes(value: Any) -> int:
    """Bytes of a tensor, or of all tensors in nested lists."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    return sum(map(_bytes, value))


class Counted(Method):
    """Follows a method and counts, at the moment of the update, its state and the reduced gradient.

    Args:
        method: The method.
    """

    def __init__(self, method: Method) -> None:
        super().__init__()
        self._method = method
        self.state, self.gradients = 0, 0

    def attach(self, model: torch.nn.Module, shards: Any, train: TrainConfig) -> None:
        """Remember the shards."""
        self._shards = shards

    def before_update(self) -> None:
        """Count the memory that the method refers to, without the shards', and that in which the gradients lie."""
        found = (self._shards.gradient(name) for name in self._shards.names)
        known = set[int]()
        self.gradients = storage_bytes([shard.data for shard in found if shard is not None], known)
        masters = (self._shards.master(name) for name in self._shards.names)
        states = (state for each in self._shards.layout.inner.state.values() for state in each.values())
        storage_bytes([*(shard.data for shard in masters if shard is not None), *states], known)
        storage_bytes([param.data for param in self._shards.params.values()], known)
        self.state = storage_bytes(tensors_in(self._method), known)


def storage_bytes(tensors: Iterable[torch.Tensor], known: set[int] | None = None) -> int:
    """Bytes of the tensors' memory, each piece once; none that is in `known`, to which they are added."""
    seen = set() if known is None else known
    total = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen and storage.nbytes():
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total


def tensors_in(value: Any, seen: set[int] | None = None) -> Iterator[torch.Tensor]:
    """All tensors that a method's object refers to, through attributes, mappings and sequences."""
    seen = set() if seen is None else seen
    if id(value) in seen or isinstance(value, torch.nn.Module | type | str | bytes | ShardView | TrackedLayer):
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from tensors_in(each, seen)
    elif isinstance(value, list | tuple | set):
        for each in value:
            yield from tensors_in(each, seen)
    elif type(value).__module__.startswith("cl_dist."):
        yield from tensors_in(vars(value) if hasattr(value, "__dict__") else (), seen)


def live_bytes() -> int:
    """Bytes of all tensors that Python knows."""
    gc.collect()
    return storage_bytes(each for each in gc.get_objects() if issubclass(type(each), torch.Tensor) and not each.is_meta)


def measure(case: Case, hidden: int, tokens: int) -> dict[str, Any]:
    """Train, and count on this rank what `predict` predicts (collective)."""
    before = live_bytes()
    engine = _engine(case, hidden, tokens)
    place = TaskPlace(index=1, name="second", steps=1000)
    engine.before_task(place)
    batches = [_batch(tokens)] * case.accumulation
    targets = sum(batch.targets for batch in batches) * case.world
    for step in range(WARM_UP):
        engine.train_step(step, batches, targets)
    counted: Any = engine.method.methods[-1]  # type: ignore[attr-defined]
    parts = {**_held(engine), "gradients": counted.gradients, "method": counted.state}
    held = live_bytes() - before
    counter = Collectives()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        engine.train_step(WARM_UP, batches, targets)
    with counter:
        engine.train_step(WARM_UP + 1, batches, targets)
    engine.destroy()
    wire = {kind: size for kind, size in counter.bytes.items() if case.world > 1}
    return {**parts, "peak": held + _highest(profile), "held": held, "wire": wire}


def _engine(case: Case, hidden: int, tokens: int) -> TrainingEngine:
    recipe = recipe_of(case, tokens)
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(llama(hidden, tokens)).to(getattr(torch, case.dtype))
    model.name_or_path = "a small Llama"
    if recipe.model.lora is not None:
        model = add_lora(model, recipe.model.lora, "causal_lm", seed=0)
    if case.checkpointing:
        enable_activation_checkpointing(model)
    method = compose(recipe.method)
    method.methods = (*method.methods, Counted(method.methods[0]))
    return TrainingEngine(LoadedModel(model, None, "causal_lm"), recipe, method)  # type: ignore[arg-type]


def _held(engine: TrainingEngine) -> dict[str, int]:
    """Bytes of each component between two steps."""
    layout, known = engine.shards.layout, set[int]()
    params = list(engine.model.parameters())
    whole = [param.data for param in params] + list(engine.model.buffers())
    pieces = [param.ds_tensor for param in params if hasattr(param, "ds_tensor")]
    states = [value for state in layout.inner.state.values() for name, value in state.items() if name != "step"]
    weights = storage_bytes([*whole, *pieces], known)
    master = storage_bytes(layout.flat_tensors(), known)
    moments = storage_bytes(states, known)
    return {"weights": weights, "master": master, "moments": moments}


def _highest(profile: torch.profiler.profile) -> int:
    """The most that the allocator handed out above its level at the start of the profile, in bytes."""
    profiler: Any = profile.profiler
    events = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    level = highest = 0
    for event in sorted(events, key=lambda each: each.start_ns()):
        level += event.nbytes()
        highest = max(highest, level)
    return highest


def _batch(tokens: int) -> Batch:
    """Samples of different lengths, so that there is padding; their answers are at the same place but for one token."""
    torch.manual_seed(torch.distributed.get_rank())
    samples = []
    for number in range(SAMPLES):
        ids = torch.randint(3, VOCABULARY, (tokens - number,)).tolist()
        samples.append(Encoded(number, ids, [IGNORE] * (len(ids) - ANSWER) + ids[-ANSWER:]))
    return collate(samples, "causal_lm", pad_id=0, decoder_start_id=None)


# Both


COLUMNS = (
    Column("ranks", "ranks"),
    Column("case", "case"),
    *(Column(part, f"cells.{part}") for part in (*PARTS, "peak", "wire")),
)


def entries(options: Namespace, device: torch.device) -> Iterator[Entry]:
    """Train every case: those of one number of ranks on one start of the ranks."""
    worlds = (1, 2) if options.processes is None else (options.processes,)
    for world in worlds:
        cases = [case for case in matrix(world) if options.zero_stage in (None, case.stage)]
        for hidden in options.hidden:
            for tokens in options.tokens:
                measured = _on_ranks(cases, hidden, tokens, world)
                for case, found in zip(cases, measured, strict=True):
                    yield compared(case, predict(case, hidden, tokens), found)


def compared(case: Case, predicted: Mapping[str, Any], measured: Mapping[str, Any]) -> Entry:
    """One row: predicted and measured bytes, and their ratios."""
    pairs = {part: (predicted[part], measured[part]) for part in (*PARTS, "peak")}
    pairs["wire"] = (sum(predicted["wire"].values()), sum(measured["wire"].values()))
    return {
        "ranks": case.world,
        "case": case.name,
        "settings": asdict(case),
        "predicted": dict(predicted),
        "measured": dict(measured),
        "ratio": {part: one / other if other else None for part, (one, other) in pairs.items()},
        "cells": {part: _cell(*pair) for part, pair in pairs.items()},
    }


def _cell(predicted: int, measured: int) -> str:
    """Measured megabytes, and by how much the prediction is off."""
    if measured == predicted == 0:
        return "0"
    off = f"{100 * (predicted / measured - 1):+.1f} %" if measured else f"{predicted / 1e6:.3g} predicted"
    return f"{measured / 1e6:.3g} MB, {off}"


def _on_ranks(cases: Sequence[Case], hidden: int, tokens: int, world: int) -> list[dict[str, Any]]:
    """What the rank measures that has most of everything, one result per case. Raises ClDistError if a rank fails."""
    arguments = {"cases": [asdict(case) for case in cases], "hidden": hidden, "tokens": tokens}
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    found: list[dict[str, Any]] = measure_on_ranks(
        "cl_dist.benchmarks.plan_accuracy:measure_cases", arguments, world, environment
    )
    return found


def measure_cases(cases: list[dict[str, Any]], hidden: int, tokens: int) -> list[dict[str, Any]]:
    """What the ranks count in each case, on every rank (collective)."""
    return [most(measure(Case(**case), hidden, tokens)) for case in cases]


def most(own: dict[str, Any]) -> dict[str, Any]:
    """Each number of the rank that has most (collective); the collectives are the same on all ranks."""
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, own)
    return {name: own[name] if name == "wire" else max(each[name] for each in everyone) for name in own}


if __name__ == "__main__":
    main("plan-accuracy")
