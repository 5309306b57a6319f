"""Rank side of test_method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from cl_dist.config.schema import ModelConfig, Recipe, StreamConfig, TaskConfig, TrainConfig, ZeroConfig
from cl_dist.engine.distributed import join
from cl_dist.engine.engine import TrainingEngine
from cl_dist.errors import ClDistError
from cl_dist.methods.composed import Composed
from cl_dist.methods.migu.config import MiguConfig
from cl_dist.methods.migu.method import Agreement, Migu
from cl_dist.methods.protocol import TaskPlace
from cl_dist.models.load import LoadedModel
from cl_dist.models.training_mode import enable_activation_checkpointing
from cl_dist.state.snapshot import load_snapshot, save_snapshot
from tests.distributed.worlds import OBJECTIVES, micro_batches, odd_model, samples, whole

STEPS = 3


def behaviours(folder: str) -> dict[str, Any]:
    """Everything that test_method checks, from one start of two ranks."""
    join(timeout_seconds=120)
    return {
        "dense_first_task": _moved_rows(index=0, first_task="dense"),
        "masked_first_task": _moved_rows(index=0, first_task="masked"),
        "masked_second_task": _moved_rows(index=1, first_task="dense"),
        "random": _random(),
        "evaluation": _evaluation(),
        "padding": {str(count): _padding(count) for count in (False, True)},
        "recomputed": [_counted_with_backward(recompute) for recompute in (False, True)],
        "all_layers": {family: _all_layers(family) for family in ("llama", "roberta")},
        "bias": {f"{mask} {skip}": _bias_moves(mask, skip) for mask in (False, True) for skip in (False, True)},
        "order": {scope: _order(scope) for scope in ("one", "step", "micro_batch")},
        "left_behind": _left_behind(),
        "disagreement": [_agreement(differ) for differ in (False, True)],
        "record": _record(Path(folder)),
        "task_sums": {scope: _task_sums(Path(folder) / scope, scope) for scope in ("step", "ahead")},
    }


def _engine(
    family: str = "llama", accumulation: int = 1, recompute: bool = False, **settings: Any
) -> tuple[TrainingEngine, Migu]:
    recipe = Recipe(
        model=ModelConfig(name_or_path="odd"),
        stream=StreamConfig(tasks=(TaskConfig(name="t", format="builtin"),)),
        train=TrainConfig(
            micro_batch_size=2,
            gradient_accumulation=accumulation,
            learning_rate=1e-2,
            eps=1e-2,
            max_skipped_steps=1,
        ),
        zero=ZeroConfig(stage=2),
        output_dir="unused",
    )
    migu = Migu(MiguConfig(name="migu", **settings))
    model = odd_model(family)
    if recompute:
        enable_activation_checkpointing(model)
    return TrainingEngine(LoadedModel(model, None, OBJECTIVES[family]), recipe, Composed([migu])), migu  # type: ignore[arg-type]


def _step(engine: TrainingEngine, step: int, family: str = "llama") -> None:
    rank, batch = torch.distributed.get_rank(), samples(family, 4, seed=step)
    mine = micro_batches(family, batch[2 * rank : 2 * rank + 2], 2)
    engine.train_step(step, mine, sum(sample.targets for sample in batch))


def _moved_rows(index: int, first_task: str) -> list[int]:
    """[rows of the tracked weights that moved in a step, rows there are]."""
    engine, _ = _engine(first_task=first_task)
    engine.before_task(TaskPlace(index, "t", STEPS))
    before = whole(engine.shards, "master")
    _step(engine, 0)
    after = whole(engine.shards, "master")
    names = [name for name in before if "_proj" in name]
    moved = sum(int((before[n] != after[n]).any(1).sum()) for n in names)
    engine.destroy()
    return [moved, sum(before[n].shape[0] for n in names)]


def _random() -> dict[str, Any]:
    """Masks of three steps with `selection: random`, as lists."""
    engine, migu = _engine(selection="random", first_task="masked")
    engine.before_task(TaskPlace(0, "t", STEPS))
    masks = []
    for step in range(STEPS):
        _step(engine, step)
        masks.append({name: keep.int().tolist() for name, keep in migu.keep.items()})
    engine.destroy()
    return {"masks": masks}


def _record(folder: Path) -> dict[str, Any]:
    """Sums of the masks of three steps. Records are in `folder`: of the run that made them; of one that resumed from
    its state; of one that took a step after resuming from a state without a record; and of a task without masks.
    `shares` has what each of them says of the share of updated elements, and `updated` the truth for the first.
    """
    engine, migu = _engine(mask="update")
    rank, place = torch.distributed.get_rank(), TaskPlace(1, "t", STEPS + 1)
    engine.before_task(place)
    sums: dict[str, torch.Tensor] = {}
    for step in range(STEPS):
        _step(engine, step)
        sums = {name: sums.get(name, 0) + keep.int() for name, keep in migu.keep.items() if name.endswith("weight")}
    state, extra = engine.method.state_dict(), engine.method.tensors()
    save_snapshot(folder / "state", engine.shards, state, moments=True, extra=extra)
    save_snapshot(folder / "old", engine.shards, {"methods": [{}]}, moments=True)
    if rank == 0:
        migu.write_results(folder / "made")
    shares = {"made": migu.kept_share()}
    weights = dict(engine.model.named_parameters())
    masked = sum(weights[name].numel() for name in sums)
    kept = sum(int(count.sum()) * weights[name].shape[1] for name, count in sums.items()) / STEPS
    everything = sum(weight.numel() for weight in weights.values())
    updated = (everything - masked + kept) / everything
    engine.destroy()

    engine, migu = _engine(mask="update")
    for name, stored in (("resumed", "state"), ("nothing", "old")):
        found = load_snapshot(folder / stored, engine.shards, engine.method.tensors(), engine.method.later_tensors)
        engine.method.tensors_loaded()
        engine.before_task(place)
        engine.method.load_state_dict(found)
        migu.write_results(folder / f"{name}-{rank}")
        shares[name] = migu.kept_share()
    _step(engine, STEPS)
    migu.write_results(folder / f"later-{rank}")
    engine.before_task(TaskPlace(0, "t", 1))
    _step(engine, 0)
    migu.write_results(folder / f"dense-{rank}")
    shares["dense"] = migu.kept_share()
    engine.destroy()
    saved = len(extra["method0.kept_rows"])
    masks = {name: each.tolist() for name, each in sums.items()}
    return {"sums": masks, "saved": saved, "shares": shares, "updated": updated}


def _task_sums(folder: Path, scope: str) -> dict[str, list[bool]]:
    """Whether the masks of the last two steps are the same: after a state was saved in the middle; after a resume from
    it; and where a step that saw a loss that is not finite, and so changed nothing, came in between.
    """
    place, masks = TaskPlace(1, "t", 4), {}
    for way in ("straight", "saved", "resumed", "skipped"):
        engine, migu = _engine(sums="task", mask_scope=scope, accumulation=2, mask="update")
        engine.before_task(place)
        if way == "resumed":
            found = load_snapshot(folder, engine.shards, engine.method.tensors())
            engine.method.tensors_loaded()
            engine.before_task(place)
            engine.method.load_state_dict(found)
        else:
            for step in range(2):
                _two_micro_batches(engine, step)
        if way == "saved":
            engine.method.before_save()
            state = engine.method.state_dict()
            save_snapshot(folder, engine.shards, state, moments=True, extra=engine.method.tensors())
        if way == "skipped":
            _two_micro_batches(engine, 7, spoilt=True)
        masks[way] = []
        for step in (2, 3):
            _two_micro_batches(engine, step)
            masks[way].append(torch.cat(list(migu.keep.values())))
        engine.destroy()
    first, second = masks["straight"]
    assert not torch.equal(first, second)
    return {way: [torch.equal(one, other) for one, other in zip(found, masks["straight"], strict=True)]
            for way, found in masks.items()}  # fmt: skip


def _two_micro_batches(engine: TrainingEngine, step: int, spoilt: bool = False) -> None:
    rank, batch = torch.distributed.get_rank(), samples("llama", 8, seed=step)
    mine = micro_batches("llama", batch[4 * rank : 4 * rank + 4], 2)
    hook = engine.model.lm_head.register_forward_hook(lambda *parts: parts[2] * float("nan")) if spoilt else None
    engine.train_step(step, mine, sum(sample.targets for sample in batch))
    if hook is not None:
        hook.remove()


def _evaluation() -> float:
    """The sums after forward passes in evaluation mode."""
    engine, migu = _engine(first_task="masked")
    engine.before_task(TaskPlace(0, "t", STEPS))
    engine.model.eval()
    with torch.no_grad():
        engine.model(**micro_batches("llama", samples("llama", 2), 2)[0].inputs)
    left = float(migu._sums.flat.sum())
    engine.destroy()
    return left


def _padding(count: bool) -> list[int]:
    """[sum of one layer's per-token magnitudes, real tokens, all positions]: a token adds exactly one."""
    engine, migu = _engine(count_padding=count, first_task="masked")
    engine.before_task(TaskPlace(0, "t", STEPS))
    batch = micro_batches("llama", samples("llama", 3, seed=5), 3)[0]
    engine.model.train()
    migu.before_forward(0, batch)
    engine.model(**batch.inputs)
    # A padding token is the zero vector in the first block; attention has filled it by the second.
    counted = list(migu._sums.by_layer.values())[-1].sum().item()
    engine.destroy()
    return [round(counted), batch.tokens, batch.labels.numel()]


def _counted_with_backward(recompute: bool) -> list[int]:
    """[sum of one layer's per-token magnitudes, real tokens] after forward and backward of one of two micro-batches."""
    engine, migu = _engine(first_task="masked", accumulation=2, recompute=recompute)
    engine.before_task(TaskPlace(0, "t", STEPS))
    batch = micro_batches("llama", samples("llama", 3, seed=5), 3)[0]
    engine.model.train()
    engine._micro_step(0, batch, batch.targets)
    counted = next(iter(migu._sums.by_layer.values())).sum().item()
    engine.destroy()
    return [round(counted), batch.tokens]


def _all_layers(family: str) -> list[list[int]]:
    """Per head layer [rows that moved, rows] in a step with `layers: all`."""
    engine, migu = _engine(family, layers="all", first_task="masked")
    engine.before_task(TaskPlace(0, "t", STEPS))
    before = whole(engine.shards, "master")
    _step(engine, 0, family)
    after = whole(engine.shards, "master")
    heads = [name for name in migu.keep if name.startswith(("lm_head", "classifier")) and name.endswith("weight")]
    moved = [[int((before[name] != after[name]).any(1).sum()), before[name].shape[0]] for name in heads]
    engine.destroy()
    return moved


def _order(scope: str) -> list[str]:
    """What happens in a step of one micro-batch, or of two with this `mask_scope`."""
    settings = {} if scope == "one" else {"mask_scope": scope}
    engine, migu = _engine(accumulation=1 if scope == "one" else 2, first_task="masked", **settings)
    engine.before_task(TaskPlace(0, "t", STEPS))
    events: list[str] = []
    all_reduce, size = torch.distributed.all_reduce, migu._sums.flat.numel()

    def noted(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if tensor.numel() >= size and tensor.dtype == torch.float64:
            events.append("sum")
        return all_reduce(tensor, *args, **kwargs)

    last = list(migu._layers.values())[-1].module
    last.register_forward_hook(lambda *_: events.append("forward"))
    last.register_full_backward_pre_hook(lambda *_: events.append("backward"))
    engine.shards.on_boundary(lambda: events.append("update"), lambda: None)
    torch.distributed.all_reduce = noted
    try:
        rank = torch.distributed.get_rank()
        mine = micro_batches("llama", samples("llama", 8, seed=1)[4 * rank : 4 * rank + 4], 2)
        engine.train_step(0, mine[: 1 if scope == "one" else 2], 10)
    finally:
        torch.distributed.all_reduce = all_reduce
    engine.destroy()
    return events


def _left_behind() -> list[str]:
    """Attributes of the tracked layers that an engine has changed once it is taken apart."""
    engine, migu = _engine(first_task="masked")
    engine.before_task(TaskPlace(0, "t", STEPS))
    _step(engine, 0)
    layers = {name: layer.module for name, layer in migu._layers.items()}
    engine.destroy()
    return [name for name, layer in layers.items() if "forward" in layer.__dict__ or layer._forward_hooks]


def _bias_moves(mask_bias: bool, skip: bool) -> list[bool]:
    """Whether the biases' moved rows are the kept ones, for one layer with biases in all rows."""
    engine, migu = _engine("roberta", mask_bias=mask_bias, skip_rows=skip, first_task="masked")
    engine.before_task(TaskPlace(0, "t", STEPS))
    before = whole(engine.shards, "master")
    _step(engine, 0, "roberta")
    after = whole(engine.shards, "master")
    name = "roberta.encoder.layer.0.output.dense"
    moved = before[f"{name}.bias"] != after[f"{name}.bias"]
    engine.destroy()
    return [torch.equal(moved, migu.keep[f"{name}.weight"]), bool(moved.all())]


def _agreement(differ: bool) -> str:
    """The message of the check after two ranks have remembered equal or different masks."""
    agreement = Agreement(torch.device("cpu"))
    flipped = differ and torch.distributed.get_rank() == 1
    agreement.remember(torch.tensor([True, False, True, flipped]))
    message = agreement.message()
    torch.distributed.all_reduce(message)
    try:
        agreement.check(message.tolist())
    except ClDistError as error:
        return str(error)
    return ""
