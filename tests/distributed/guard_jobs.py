"""Rank side of test_guards: engines that meet a NaN, against engines that never do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from cl_dist.config.schema import ModelConfig, Recipe, StreamConfig, TaskConfig, TrainConfig, ZeroConfig
from cl_dist.engine.distributed import join
from cl_dist.engine.engine import StepResult, TrainingEngine
from cl_dist.engine.guard import check_replicas
from cl_dist.errors import ClDistError
from cl_dist.methods.composed import Composed
from cl_dist.methods.kif.config import KifConfig
from cl_dist.methods.kif.method import Kif
from cl_dist.methods.migu.config import MiguConfig
from cl_dist.methods.migu.method import Migu
from cl_dist.methods.protocol import Method, TaskPlace
from cl_dist.methods.recurrent_kif.config import RecurrentKifConfig
from cl_dist.methods.recurrent_kif.method import RecurrentKif
from cl_dist.models.load import LoadedModel
from cl_dist.tasks.plan import Cycles
from tests.distributed.worlds import OBJECTIVES, micro_batches, odd_model, samples, together, whole

FAMILY = "llama"
MICRO = 2
POISONED = "layers.1.mlp.down_proj.weight"
BAD_RANK = 1


def run_all(skips: list[dict[str, Any]], stops: list[dict[str, Any]], stages: list[int]) -> dict[str, Any]:
    """All in one start of the ranks.

    `skips`: what a bad step changed, and how far the end is from that of an engine without it. `stops`: this rank's
    outcome of each step, `done`, why it was skipped, or what stopped it. `replicas`, for each of `stages`: parameters
    compared, and what is said when one rank's weight changes.
    """
    join(timeout_seconds=120)
    return {
        "skips": [_skip(**case) for case in skips],
        "stops": [_stops(**case) for case in stops],
        "cycle": _cycle(stage=2),
        "replicas": [_replicas(stage) for stage in stages],
    }


def _cycle(stage: int) -> dict[str, Any]:
    """Recurrent-KIF whose cycle ends with a bad step: what differs from fusing without that step."""
    engine = _in_a_cycle(stage)
    before = whole(engine.shards, "master")
    with _poisoned(engine, "gradient"):
        skipped = _step(engine, 3).skipped
    after = whole(engine.shards, "master")
    engine.destroy()
    other = _in_a_cycle(stage)
    assert isinstance(other.method, Composed)
    method = other.method.methods[0]
    assert isinstance(method, RecurrentKif)
    method._fuse()
    fused = whole(other.shards, "master")
    other.destroy()
    return {"skipped": skipped, "fused": len(_different(before, after)), "differs": _different(after, fused)}


def _in_a_cycle(stage: int) -> TrainingEngine:
    """After two steps on the task and one of two on the past."""
    config = RecurrentKifConfig(name="recurrent_kif", units="matrix", threshold=40.0, orthogonal=0.0)
    engine = _engine(stage, methods=[RecurrentKif(config)])
    engine.before_task(TaskPlace(1, "t", 8, cycles=Cycles(own=4, inner=2, outer=2)))
    for step in range(3):
        _step(engine, step)
    return engine


def _engine(
    stage: int, dtype: str = "float32", accumulation: int = 1, offload: bool = False, clip: float | None = 0.1,
    deepspeed: dict[str, Any] | None = None, max_skipped: int = 1, check_every: int | None = None,
    methods: list[Method] | None = None,
) -> TrainingEngine:  # fmt: skip
    recipe = Recipe(
        model=ModelConfig(name_or_path="odd"),
        stream=StreamConfig(tasks=(TaskConfig(name="t", format="builtin"),)),
        train=TrainConfig(
            micro_batch_size=MICRO, gradient_accumulation=accumulation, learning_rate=1e-2, eps=1e-2, clip=clip,
            weight_decay=0.1, dtype=dtype, max_skipped_steps=max_skipped,  # type: ignore[arg-type]
            check_replicas_every=check_every,
        ),
        zero=ZeroConfig(stage=stage, offload=offload, deepspeed=deepspeed or {}),  # type: ignore[arg-type]
        output_dir="unused",
    )  # fmt: skip
    model = odd_model(FAMILY).to(getattr(torch, dtype))
    methods = methods or [
        Migu(MiguConfig(name="migu", mask="update", first_task="masked")),
        Kif(KifConfig(name="kif", units="matrix")),
    ]
    engine = TrainingEngine(LoadedModel(model, None, OBJECTIVES[FAMILY]), recipe, Composed(methods))  # type: ignore[arg-type]
    engine.before_task(TaskPlace(0, "t", 10))
    return engine


def _step(engine: TrainingEngine, step: int) -> StepResult:
    per_rank = MICRO * engine.recipe.train.gradient_accumulation
    batch = samples(FAMILY, per_rank * torch.distributed.get_world_size(), seed=step)
    rank = torch.distributed.get_rank()
    targets = sum(sample.targets for sample in batch)
    return engine.train_step(step, micro_batches(FAMILY, batch[rank * per_rank :][:per_rank], MICRO), targets)


@contextmanager
def _poisoned(engine: TrainingEngine, kind: str) -> Iterator[None]:
    """Inside, rank 1's loss is NaN, or a gradient of its is infinite while the loss is not."""
    handle = None
    if torch.distributed.get_rank() == BAD_RANK:
        if kind == "loss":
            handle = engine.model.register_forward_hook(_nan_logits)
        else:
            handle = dict(engine.model.named_parameters())[f"model.{POISONED}"].register_hook(_infinite_element)
    yield
    if handle is not None:
        handle.remove()


def _nan_logits(module: torch.nn.Module, inputs: Any, output: Any) -> Any:
    output.logits = output.logits * float("nan")
    return output


def _infinite_element(gradient: torch.Tensor) -> torch.Tensor:
    gradient = gradient.clone()
    gradient.view(-1)[-1] = float("inf")
    return gradient


def _state(engine: TrainingEngine) -> dict[str, torch.Tensor]:
    """All that an optimiser step may change, whole."""
    state = {
        f"{quantity}/{name}": tensor
        for quantity in ("master", "exp_avg", "exp_avg_sq")
        for name, tensor in whole(engine.shards, quantity).items()
    }
    for quantity, held in engine.method.tensors().items():
        if not quantity.endswith((".scores", ".kept_rows")):  # not of the parameters' shapes
            state.update({f"{quantity}/{name}": tensor for name, tensor in together(held, engine.shards).items()})
        else:
            state.update({f"{quantity}/{name}": shard.data.clone() for name, shard in held.items()})
    state.update(_weights(engine))
    state["optimizer step"] = torch.tensor(engine.shards.optimizer_step)
    return state


def _weights(engine: TrainingEngine) -> dict[str, torch.Tensor]:
    """What the model computes with."""
    from deepspeed.runtime.zero import GatheredParameters

    weights = {}
    for name, param in engine.model.named_parameters():
        with GatheredParameters([param]):
            weights[f"weight/{name}"] = param.detach().clone()
    return weights


def _different(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> list[str]:
    assert before.keys() == after.keys()
    return [name for name in before if not torch.equal(before[name], after[name])]


def _skip(kind: str, **settings: Any) -> dict[str, Any]:
    engine = _engine(**settings)
    _step(engine, 0)
    before = _state(engine)
    with _poisoned(engine, kind):
        skipped = _step(engine, 1).skipped
    report: dict[str, Any] = {"skipped": skipped, "changed": _different(before, _state(engine))}
    assert isinstance(engine.method, Composed)
    migu = engine.method.methods[0]
    assert isinstance(migu, Migu)
    report["sums left"] = float(migu._sums.flat.abs().sum())
    report["skipped after"] = _step(engine, 2).skipped
    end = _state(engine)
    engine.destroy()
    other = _engine(**settings)
    _step(other, 0)
    _step(other, 2)
    report["differs"] = _different(end, _state(other))
    report["moved"] = len(_different(before, end))
    other.destroy()
    return report


def _stops(steps: list[str], **settings: Any) -> list[str]:
    engine = _engine(**settings)
    outcomes = []
    for number, kind in enumerate(steps):
        try:
            with _poisoned(engine, kind) if kind != "healthy" else _nothing():
                outcomes.append(_step(engine, number).skipped or "done")
        except ClDistError as error:
            outcomes.append(str(error))
            break
    engine.destroy()
    return outcomes


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _told(check: Callable[[], Any]) -> str:
    try:
        check()
    except ClDistError as error:
        return str(error)
    return ""


def _replicas(stage: int) -> dict[str, Any]:
    engine = _engine(stage, check_every=2)
    _step(engine, 0)
    _step(engine, 1)
    report: dict[str, Any] = {"compared": check_replicas(engine.model, "here"), "parameters": len(engine.shards.names)}
    name = "model.norm.weight"
    if torch.distributed.get_rank() == BAD_RANK:
        dict(engine.model.named_parameters())[name].data[3] *= 1.0 + 2.0**-20
    report["told"] = _told(lambda: check_replicas(engine.model, "here"))
    report["in the step"] = _told(lambda: _step(engine, 3)) if stage == 0 else ""
    engine.destroy()
    return report
