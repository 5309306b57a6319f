"""Builds the parts of a run from its recipe: stream, model, method, engine, evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from cl_dist.config.files import cache_folder
from cl_dist.config.objectives import FACTS, ObjectiveName
from cl_dist.config.schema import EvalConfig, Recipe
from cl_dist.engine.device import device
from cl_dist.engine.engine import TrainingEngine
from cl_dist.engine.settings import deepspeed_config
from cl_dist.engine.trainer import TaskTrainer
from cl_dist.errors import BadInput
from cl_dist.evaluation.answer_length import check_general_room, check_room
from cl_dist.evaluation.evaluate import Evaluator, stay_sharded
from cl_dist.evaluation.general import GeneralEvaluator, HarnessTasks, load_harness_tasks
from cl_dist.evaluation.modes import resolve_mode
from cl_dist.evaluation.outlook import Notice, outlook
from cl_dist.heartbeat import beat
from cl_dist.methods.composed import compose
from cl_dist.models.load import LoadedModel, check_length, load_model
from cl_dist.models.lora import add_lora, load_adapter, without_adapter
from cl_dist.models.structure import base_model
from cl_dist.models.training_mode import enable_activation_checkpointing
from cl_dist.state.collective_failure import on_first_rank
from cl_dist.state.token_cache import TokenCache
from cl_dist.tasks.encode import Encoder, label_names
from cl_dist.tasks.stream import load_method_data, load_stream
from cl_dist.tasks.tokenised import TokenisedData
from cl_dist.tasks.types import Task

SHOWN_TASKS = 6
"""How many tasks are named while the data is checked."""


@dataclass(frozen=True)
class System:
    """The parts of a run on one rank."""

    recipe: Recipe
    tasks: tuple[Task, ...]
    loaded: LoadedModel
    data: TokenisedData
    engine: TrainingEngine
    evaluator: Evaluator
    general: GeneralEvaluator | None
    """None if the recipe does not measure general ability."""
    notices: tuple[Notice, ...] = ()
    """Remarks on the tasks' scores, for the log."""
    method_data: Mapping[str, Task] = field(default_factory=dict)
    """The data sets that methods name, by setting."""

    @property
    def sources(self) -> tuple[Task, ...]:
        """Everything that was read: the tasks, and the data sets that methods name."""
        return (*self.tasks, *self.method_data.values())

    def trainer(self, index: int) -> TaskTrainer:
        """Return the trainer for the task at position `index` of the stream."""
        beat("tokenising the data", opaque=True)
        stream = self.data.stream(self.tasks)
        samples = self.engine.training_data(index, stream)
        memory = self.engine.method.memory(index, stream)
        tokenizer, pad_id = self.loaded.tokenizer, self.data.encoder.pad_id
        data = {setting: self.data.train(task) for setting, task in self.method_data.items()}
        return TaskTrainer(self.engine, samples, tokenizer, pad_id, index, memory, stream[: index + 1], data)

    def start_messages(self) -> list[str]:
        """Sentences to log when a run starts: the matrices without an adapter, and the method's own messages."""
        lora = self.recipe.model.lora
        left_out = without_adapter(self.engine.model) if lora and lora.target_modules == "all-linear" else None
        return [*([left_out] if left_out else []), *(self.engine.method.start_message() or "").splitlines()]


def unheard(phase: str) -> None:
    """Report no phases."""


def build_system(recipe: Recipe, recipe_dir: Path, phase: Callable[[str], None] = unheard) -> System:
    """Read the data, load the model and build the DeepSpeed engine around it (collective).

    Whatever can be checked without the engine is checked before it is built, which is the expensive part. `phase` is
    called with the name of each part before it begins.

    Raises:
        BadInput: Data, model and method do not fit together.
    """

    def begin(what: str, detail: str = "") -> None:
        phase(f"{what}{detail}")
        beat(what, opaque=True)

    begin("reading the data")
    tasks = load_stream(recipe.stream, recipe_dir, recipe.train)
    method_data = load_method_data(recipe, recipe_dir)
    names = label_names(tasks)

    if recipe.eval.general is not None:
        begin("loading the tasks of general ability")
    harness = load_harness_tasks(recipe.eval.general) if recipe.eval.general is not None else None

    begin("loading the model", f" {recipe.model.name_or_path}")
    loaded = _load(recipe, len(names))
    check_length(loaded, recipe.train.max_length, recipe.train.max_target_length)

    begin("checking the data", f": {_amounts(tasks)}")
    data = _tokenised(recipe, loaded, names)
    notices = _check_data(tasks, loaded.model, data, loaded.objective, recipe.eval, trained=True)
    on_first_rank(lambda: _check_method_data(method_data, data))

    begin("building the engine", f": ZeRO stage {recipe.zero.stage}, two trial batches")
    engine = TrainingEngine(loaded, recipe, compose(recipe.method))
    evaluator = _evaluator(recipe, engine.model, loaded, data, names, recipe.zero.stage == 3, engine.whole)
    general = _general(recipe, engine.model, loaded, harness)
    return System(recipe, tasks, loaded, data, engine, evaluator, general, notices, method_data)


def _amounts(tasks: Sequence[Task]) -> str:
    """`spring 1,000 samples, summer 1,000, and 98 more tasks`: of the training data."""
    shown = [f"{task.name} {len(task.train):,}" for task in tasks[:SHOWN_TASKS]]
    shown[0] += " samples"
    more = len(tasks) - len(shown)
    return ", ".join(shown) + (f", and {more} more tasks" if more else "")


def build_saved(
    recipe: Recipe, recipe_dir: Path, folder: Path
) -> tuple[tuple[Task, ...], Evaluator, tuple[Notice, ...]]:
    """Load the model that a run saved in `folder`, unsharded on every rank, for evaluation only.

    Raises:
        BadInput: The data or the saved model is unusable.
    """
    tasks = load_stream(recipe.stream, recipe_dir, recipe.train)
    names = label_names(tasks)
    loaded = load_saved(recipe, folder, len(names))
    model: torch.nn.Module = loaded.model
    data = _tokenised(recipe, loaded, names)
    notices = _check_data(tasks, model, data, loaded.objective, recipe.eval, trained=False)
    return tasks, _evaluator(recipe, model.to(device()), loaded, data, names), notices


def load_saved(recipe: Recipe, folder: Path, labels: int, dtype: torch.dtype | None = None) -> LoadedModel:
    """Load the model or the adapter that a run saved in `folder`, unsharded and on the CPU.

    Args:
        recipe: The run's recipe; with adapters it names the base model.
        folder: A task's model folder.
        labels: Number of classes of a classifier.
        dtype: Precision of the parameters; None: that of the recipe.

    Raises:
        BadInput: Model, adapter or base model is missing or damaged.
    """
    source = recipe.model
    if source.lora is None:
        source = replace(source, name_or_path=str(folder), gguf_file=None)
    loaded = load_model(
        source,
        labels,
        zero3_config=None,
        dtype=dtype_of(recipe) if dtype is None else dtype,
        seed=recipe.train.seed,
        cache_dir=cache_folder(),
        chat=recipe.train.template == "chat",
    )
    if source.lora is None:
        return loaded
    return replace(loaded, model=load_adapter(base_model(loaded.model), folder))


def dtype_of(recipe: Recipe) -> torch.dtype:
    """Precision of the model's parameters."""
    return torch.bfloat16 if recipe.train.dtype == "bfloat16" else torch.float32


def _load(recipe: Recipe, labels: int) -> LoadedModel:
    loaded = load_model(
        recipe.model,
        labels,
        zero3_config=deepspeed_config(recipe) if recipe.zero.stage == 3 else None,
        dtype=dtype_of(recipe),
        seed=recipe.train.seed,
        cache_dir=cache_folder(),
        chat=recipe.train.template == "chat",
    )
    model: PreTrainedModel | PeftModel = loaded.model
    if recipe.model.lora is not None:
        model = add_lora(base_model(loaded.model), recipe.model.lora, loaded.objective, recipe.train.seed, loaded.drawn)
    if recipe.train.activation_checkpointing:
        enable_activation_checkpointing(model)
    return replace(loaded, model=model)


def _tokenised(recipe: Recipe, loaded: LoadedModel, names: tuple[str, ...]) -> TokenisedData:
    encoder = Encoder(loaded.tokenizer, loaded.objective, recipe.train, names)
    return TokenisedData(encoder, TokenCache(cache_folder() / "tokens"))


def _check_data(
    tasks: Sequence[Task],
    model: torch.nn.Module,
    data: TokenisedData,
    objective: ObjectiveName,
    config: EvalConfig,
    trained: bool,
) -> tuple[Notice, ...]:
    """Check the data, as far as that takes a tokenizer, and return remarks on the scores (collective).

    Rank 0 checks for all. A task is tokenised when its turn comes, but what is wrong with it must show now.

    Raises:
        BadInput: A task cannot be scored, needs too many positions or, if `trained`, has answers that are too long.
    """

    def check() -> tuple[Notice, ...]:
        notices = outlook(tasks, data.encoder, objective, config)
        generated = [task for task in tasks if resolve_mode(task, objective, config) == "generate"]
        if generated:
            check_room(model, data, generated, config)
        for task in tasks if trained else ():
            data.encoder.check(task)
        return notices

    return on_first_rank(check)


def _check_method_data(method_data: Mapping[str, Task], data: TokenisedData) -> None:
    for task in method_data.values():
        data.encoder.check(task)


def _evaluator(
    recipe: Recipe,
    model: torch.nn.Module,
    loaded: LoadedModel,
    data: TokenisedData,
    names: tuple[str, ...],
    synced: bool = False,
    whole: Callable[[], AbstractContextManager[bool]] = stay_sharded,
) -> Evaluator:
    return Evaluator(
        model=model,
        tokenizer=loaded.tokenizer,
        objective=loaded.objective,
        data=data,
        label_names=names,
        config=recipe.eval,
        rank=torch.distributed.get_rank(),
        world=torch.distributed.get_world_size(),
        synced=synced,
        whole=whole,
    )


def _general(
    recipe: Recipe, model: torch.nn.Module, loaded: LoadedModel, tasks: HarnessTasks | None
) -> GeneralEvaluator | None:
    """Build the evaluator of general ability; raise BadInput if the model cannot generate."""
    if recipe.eval.general is None or tasks is None:
        return None
    if not FACTS[loaded.objective].generates:
        raise BadInput(f"eval.general: needs a model that generates text, but its objective is {loaded.objective}")
    check_general_room(model, tasks)
    synced = recipe.zero.stage == 3
    config, size = recipe.eval.general, recipe.eval.batch_size
    return GeneralEvaluator(model, loaded.tokenizer, tasks, config, size, synced, recipe.train.date)
