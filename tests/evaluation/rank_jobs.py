"""Evaluation in one process or on two ranks; called by tests.ranks, so results are JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

from cl_dist.config.schema import EvalConfig, LoraConfig, ModelConfig, TrainConfig
from cl_dist.engine.distributed import join
from cl_dist.evaluation.evaluate import Evaluator, no_pause, stay_sharded
from cl_dist.evaluation.result import TaskScore
from cl_dist.models.load import LoadedModel, load_model
from cl_dist.models.lora import add_lora
from cl_dist.models.structure import base_model
from cl_dist.sharding import gathered, sharded_bytes
from cl_dist.tasks.encode import Encoder, label_names
from cl_dist.tasks.tokenised import TokenisedData
from cl_dist.tasks.types import Example, Slot, Task

SEED = 3
WORDS = ("apple", "river", "seven", "cloud", "stone", "paper", "green", "night", "quick")
LABELS = ("yes", "not", "may")


def sentence(number: int) -> str:
    """A text whose length and words depend on the number."""
    return " ".join(WORDS[(number * 5 + place * place) % len(WORDS)] for place in range(1 + number * 3 % 7))


def classification(samples: int, name: str = "classify") -> Task:
    """A task with three labels of equal length, so that none has an advantage."""
    examples = tuple(Example(f"{sentence(n)}\nAnswer:", LABELS[n % 3]) for n in range(samples))
    return Task(name, "classification", examples, examples, LABELS)


def generation(samples: int) -> Task:
    """A task with free answers."""
    examples = tuple(Example(f"{sentence(n)}\nContinue:", sentence(n + 1)) for n in range(samples))
    return Task("continue", "generation", examples, examples)


def text(samples: int) -> Task:
    """A task of documents."""
    examples = tuple(Example("", sentence(n) + ".") for n in range(samples))
    return Task("read", "text", examples, examples)


def dialogue(answers: list[str]) -> Task:
    """One slot for each answer, three per turn; a turn's samples go to different ranks."""
    examples = tuple(
        Example(f"{sentence(n)}\nContinue:", answer, slot=Slot(f"d-{n // 3}", f"service-{n % 3}"))
        for n, answer in enumerate(answers)
    )
    return Task("track", "generation", examples, examples)


def load(case: dict[str, Any], zero3_config: dict[str, Any] | None, label_count: int) -> LoadedModel:
    """The case's model; with `lora`, it has adapters that change its answers."""
    config = ModelConfig(name_or_path=case["model"], objective=case.get("objective", "auto"))
    loaded = load_model(
        config, label_count, zero3_config=zero3_config, dtype=torch.float32, seed=SEED, cache_dir=Path("unused")
    )
    if not case.get("lora"):
        return loaded
    model: Any = loaded.model
    adapted = add_lora(model, LoraConfig(r=2), loaded.objective, SEED)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:  # initially zero; not sharded before the engine is built
                parameter.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(SEED))
    return LoadedModel(adapted, loaded.tokenizer, loaded.objective)


def tasks_of(case: dict[str, Any]) -> list[Task]:
    """The case's tasks: uneven numbers of batches on two ranks, and one task with a single sample."""
    makers = {"classification": classification, "generation": generation, "text": text, "dialogue": dialogue}
    return [makers[kind](samples) for kind, samples in case["tasks"]]


def evaluator(
    loaded: LoadedModel,
    model: nn.Module,
    case: dict[str, Any],
    rank: int = 0,
    world: int = 1,
    synced: bool = False,
    whole: Callable[[], AbstractContextManager[bool]] = stay_sharded,
) -> Evaluator:
    """An evaluator of the case's tasks, with batches of three unless the case says otherwise."""
    names = label_names(tasks_of(case))
    encoder = Encoder(loaded.tokenizer, loaded.objective, TrainConfig(max_length=48, max_target_length=16), names)
    chosen = {key: case[key] for key in ("mode", "metric") if key in case}
    data = TokenisedData(encoder)
    config = EvalConfig(batch_size=case.get("batch_size", 3), max_new_tokens=6, **chosen)
    return Evaluator(model, loaded.tokenizer, loaded.objective, data, names, config, rank, world, synced, whole)


def evaluate_alone(case: dict[str, Any]) -> list[dict[str, Any]]:
    """The case's scores in this process, without DeepSpeed."""
    loaded = load(case, None, len(label_names(tasks_of(case))))
    return _scores(evaluator(loaded, loaded.model, case), tasks_of(case))


def _scores(scorer: Evaluator, tasks: list[Task], pause: Callable[[], None] = no_pause) -> list[dict[str, Any]]:
    """The scores of all tasks, in the evaluator's passes."""
    return [asdict(score) for each in scorer.passes(tasks) for score in scorer.evaluate(each, pause)]


def evaluate_on_ranks(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per case: this rank's scores before and after two training steps that do not change the weights.

    Where stage 3 generates, also the scores with gathered weights in between, and what that leaves behind.
    """
    join(timeout_seconds=120)
    return [_evaluate_engine(case) for case in cases]


def _evaluate_engine(case: dict[str, Any]) -> dict[str, Any]:
    config = _settings(case["stage"])
    loaded = load(case, config if case["stage"] == 3 else None, len(label_names(tasks_of(case))))
    trained = [parameter for parameter in loaded.model.parameters() if parameter.requires_grad]
    engine = deepspeed.initialize(model=loaded.model, optimizer=torch.optim.SGD(trained, lr=0.0), config=config)[0]
    scorer = evaluator(loaded, engine.module, case, dist.get_rank(), dist.get_world_size(), case["stage"] == 3)
    before = _scores(scorer, tasks_of(case), pause=dist.barrier)
    gathered = _gathered_scores(engine, loaded, case) if case.get("gather") else None
    for _ in range(2):
        _step(engine, loaded)
    after = _scores(scorer, tasks_of(case))
    engine.destroy()
    return {"before": before, "after": after, "gathered": gathered}


def _gathered_scores(engine: deepspeed.DeepSpeedEngine, loaded: LoadedModel, case: dict[str, Any]) -> dict[str, Any]:
    """Scores, forward passes of this rank with sharded and with gathered weights, and whether a trace remains."""
    model, passes = engine.module, [0, 0]
    inside = False

    @contextmanager
    def whole() -> Iterator[bool]:
        nonlocal inside
        with gathered(engine):
            assert sharded_bytes(model) == 0
            inside = True
            yield True
            inside = False

    def count(*_: Any) -> None:
        passes[inside] += 1

    counter = base_model(model).register_forward_hook(count)
    sharded, hooks = sharded_bytes(model), _hooks(model)
    rank, world = dist.get_rank(), dist.get_world_size()
    for make in (stay_sharded, whole):
        scores = _scores(evaluator(loaded, model, case, rank, world, True, make), tasks_of(case))
    restored = sharded_bytes(model) == sharded > 0 and _hooks(model) == hooks
    counter.remove()
    return {"scores": scores, "passes": passes, "restored": restored}


def _hooks(model: nn.Module) -> list[Any]:
    """All forward hooks of all modules, in order."""
    return [
        list(hooks.items())
        for module in model.modules()
        for hooks in (module._forward_pre_hooks, module._forward_hooks)
    ]


def _step(engine: deepspeed.DeepSpeedEngine, loaded: LoadedModel) -> None:
    """One training step by the model's own loss."""
    inputs = loaded.tokenizer(["What is this?", "Some other text."], return_tensors="pt", padding=True)
    labels = torch.tensor([2, 0]) if loaded.objective == "classification" else inputs["input_ids"]
    engine.train()
    engine.backward(engine(**inputs, labels=labels).loss)
    engine.step()


def _settings(stage: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": stage,
            "stage3_param_persistence_threshold": 0,
            "reduce_bucket_size": 20_000,
            "stage3_prefetch_bucket_size": 10_000,
        },
    }


def built(model: str, tasks: list[Any], **case: Any) -> tuple[Evaluator, LoadedModel]:
    """An evaluator in this process, and its model."""
    whole = {"model": model, "tasks": tasks, **case}
    loaded = load(whole, None, len(LABELS))
    return evaluator(loaded, loaded.model, whole), loaded


def score_one(evaluator: Evaluator, task: Task) -> TaskScore:
    """The score of a pass over one task."""
    return evaluator.evaluate([task])[0]
