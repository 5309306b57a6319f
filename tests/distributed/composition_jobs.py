"""Rank side of test_composition: MIGU and KIF in one engine; parts chosen for a task with LwF or A-GEM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from cl_dist.config.schema import ModelConfig, Recipe, StreamConfig, TaskConfig, TrainConfig, ZeroConfig
from cl_dist.engine.distributed import join
from cl_dist.engine.engine import TrainingEngine
from cl_dist.methods.composed import Composed
from cl_dist.methods.kif.config import KifConfig
from cl_dist.methods.kif.method import Kif
from cl_dist.methods.migu.config import MiguConfig
from cl_dist.methods.migu.method import Migu
from cl_dist.methods.protocol import Method, TaskPlace
from cl_dist.methods.s2ft.config import S2ftConfig
from cl_dist.methods.s2ft.method import S2ft
from cl_dist.methods.ssu.config import SsuConfig
from cl_dist.methods.ssu.method import Ssu
from cl_dist.models.load import LoadedModel
from cl_dist.models.tracked import tracked_linears
from cl_dist.sharding import gather_state_dict
from cl_dist.state.snapshot import load_snapshot, save_snapshot
from cl_dist.tasks.types import Encoded
from tests.distributed.penalty_jobs import Case, begin, build_engine, build_method, stream
from tests.distributed.worlds import micro_batches, odd_model, samples, together, whole
from tests.oracle_selective import ssu_columns

STEPS = 3
BATCH = 4


def train(stage: int, order: list[str], skip_rows: bool) -> dict[str, Any]:
    """One masked task under MIGU and KIF in the given order; what importance came to, and where."""
    world, rank = join(timeout_seconds=120)[1], torch.distributed.get_rank()
    size = BATCH // world
    recipe = Recipe(
        model=ModelConfig(name_or_path="odd"),
        stream=StreamConfig(tasks=(TaskConfig(name="t", format="builtin"),)),
        train=TrainConfig(micro_batch_size=size, learning_rate=1e-2, eps=1e-2),
        zero=ZeroConfig(stage=stage),  # type: ignore[arg-type]
        output_dir="unused",
    )
    kif = Kif(KifConfig(name="kif", units="row"))
    migu = Migu(MiguConfig(name="migu", first_task="masked", skip_rows=skip_rows))
    methods = {"migu": migu, "kif": kif}
    model = odd_model("llama")
    layers = [f"{name}.weight" for name in tracked_linears(model, "blocks")]
    engine = TrainingEngine(LoadedModel(model, None, "causal_lm"), recipe, Composed([methods[name] for name in order]))  # type: ignore[arg-type]
    engine.before_task(TaskPlace(0, "t", STEPS))
    for step in range(STEPS):
        batch = samples("llama", BATCH, seed=step)
        mine = micro_batches("llama", batch[rank * size : (rank + 1) * size], size)
        engine.train_step(step, mine, sum(sample.targets for sample in batch))
    smoothed = together(kif.tensors()["smoothed"], engine.shards)
    masters = whole(engine.shards, "master")
    engine.destroy()
    return {
        "untouched_rows": {name: int((smoothed[name] == 0).all(dim=1).sum()) for name in layers},
        "rows": {name: smoothed[name].shape[0] for name in layers},
        "smoothed": torch.cat([smoothed[name].reshape(-1) for name in layers]).tolist(),
        "weights": torch.cat([tensor.reshape(-1) for tensor in masters.values()]).tolist(),
    }


def chosen_parts(cases: list[dict[str, Any]], folder: str) -> dict[str, Any]:
    """Parts chosen for a task, with another method: how far from the oracle, and what a resume changes."""
    join(timeout_seconds=120)
    cases_found = [Chosen(**case).run() for case in cases]
    return {"cases": cases_found, "resumed": [_resumed(name, Path(folder) / name) for name in ("ssu", "s2ft")]}


def selector_of(name: str) -> Ssu | S2ft:
    """A method that chooses for a task what it trains."""
    if name == "ssu":
        return Ssu(SsuConfig(name="ssu", calibration="unread", keep=0.4, samples=5))
    matrices = ("value", "output", "up", "gate", "down")
    return S2ft(S2ftConfig(name="s2ft", heads=0.5, channels=0.3, matrices=matrices))  # type: ignore[arg-type]


def calibration() -> dict[str, list[Encoded]]:
    """The samples that source-shielded updates measure."""
    return {"calibration": samples("llama", 5, seed=99)}


class Chosen(Case):
    """A selection before LwF or A-GEM: their loss, or their projection, concerns what is trained alone."""

    def __init__(self, selector: str, **settings: Any) -> None:
        self.selector = selector_of(selector)
        super().__init__(**settings)
        self._before = {name: parameter.detach().clone() for name, parameter in self.dense.params.items()}

    def methods(self) -> list[Method]:
        return [self.selector, self.method]

    def _task(self, index: int) -> dict[str, float]:
        trainer, place = begin(self.engine, self.tasks, index, calibration())
        self._listen(place)
        self.dense.start_task()
        self.dense.masks = self._masks(place)
        for step in range(trainer.steps):
            trainer.step(step)
            self._dense_step(index, [self.tasks[index][number] for number in trainer.samples(step)])
        self.engine.method.after_task(place)
        weights = gather_state_dict(self.engine.model)
        errors = {"trained": 0.0, "moved": 0.0, "effect": 0.0}
        for name, mask in self.dense.masks.items() if weights else ():  # the first rank has the weights
            apart = (weights[name] - self.dense.params[name].detach()).abs()
            change = (weights[name] - self._before[name]).abs()
            errors["trained"] = max(errors["trained"], float(apart.max()))
            errors["moved"] = max(errors["moved"], float((change * ~mask).max()))
            errors["effect"] = max(errors["effect"], float((change * mask).max()))
        self._before = weights
        return errors

    def _masks(self, place: TaskPlace) -> dict[str, torch.Tensor]:
        """True for what the task trains."""
        rest = self.selector.trains_rest
        masks = {name: torch.full(each.shape, rest(name)) for name, each in self.dense.params.items()}
        parts = self.selector._parts
        if isinstance(self.selector, Ssu):
            inputs = [micro_batches("llama", [sample], 1)[0].inputs for sample in calibration()["calibration"]]
            names = [part.part.weight for part in parts]
            return masks | ssu_columns(self.dense.model, inputs, names, self.selector.config.keep)
        chosen: Mapping[str, torch.Tensor] = self.selector.choose(place)
        for part in parts:
            masks[part.part.weight] = torch.zeros_like(masks[part.part.weight])
            masks[part.part.weight].index_fill_(part.axis, chosen[part.part.weight], True)
        return masks


def _resumed(selector: str, folder: Path) -> float:
    """How far a run ends from an undisturbed one if it is saved in its second task and goes on; under ZeRO-2 with LwF,
    which then has to measure the old model's responses again.
    """
    tasks = stream("llama", 1)

    def made() -> Any:
        methods = [selector_of(selector), build_method("lwf", weight=3.0)]
        return build_engine(methods, odd_model("llama"), "llama", 2)

    def weights(engine: Any, place: TaskPlace) -> Mapping[str, torch.Tensor]:
        engine.method.after_task(place)
        return gather_state_dict(engine.model)

    engine = made()
    trainer, place = begin(engine, tasks, 0, calibration())
    _steps(trainer, range(trainer.steps))
    engine.method.after_task(place)
    trainer, place = begin(engine, tasks, 1, calibration())
    _steps(trainer, [0, 1])
    save_snapshot(folder, engine.shards, engine.method.state_dict(), moments=True, extra=engine.method.tensors())
    _steps(trainer, [2])
    expected = weights(engine, place)
    engine.destroy()
    again = made()
    again.prepare_task(1)
    state = load_snapshot(folder, again.shards, again.method.tensors())
    again.method.tensors_loaded()
    trainer, place = begin(again, tasks, 1, calibration(), resumed=True)
    again.method.load_state_dict(state)
    _steps(trainer, [2])
    found = weights(again, place)
    again.destroy()
    return max([0.0, *(float((found[name] - expected[name]).abs().max()) for name in expected)])


def _steps(trainer: Any, numbers: Sequence[int]) -> None:
    for number in numbers:
        trainer.step(number)
