"""How long a whole stream takes: optimiser steps, evaluation after every task, checkpoints. Everything is predicted.

Lengths are counted in characters when the data is here, since a plan needs no tokenizer; without data they are the
recipe's limits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from cl_dist.config.schema import CheckpointConfig, Recipe
from cl_dist.engine.engine import GATHERED_SHARE
from cl_dist.errors import BadInput
from cl_dist.evaluation.modes import resolve_mode
from cl_dist.methods.cost import Collective
from cl_dist.models.structure import base_model
from cl_dist.planning.devices import EFFICIENCY, Device
from cl_dist.planning.memory import Memory
from cl_dist.planning.setup import Setup
from cl_dist.planning.shape import ModelShape
from cl_dist.planning.step_time import Arithmetic, StepTime, collective_seconds
from cl_dist.tasks.plan import planned_steps
from cl_dist.tasks.stream import load_stream
from cl_dist.tasks.types import Task

CHARACTERS_PER_TOKEN = 4.0
"""Assumed of English text (OpenAI's help pages give the same rule of thumb)."""
LABEL_TOKENS = 4
"""Assumed tokens of a label."""


@dataclass(frozen=True)
class TaskSize:
    """How much there is to train on and to score."""

    name: str
    train: int
    evaluation: int
    length: float
    """Mean tokens of a training sample: prompt and answer for a decoder, the source for an encoder-decoder."""
    answer: float
    """Mean tokens of an answer."""
    labels: int = 0
    """Labels to score by their likelihood."""
    generates: bool = True
    """Whether answers are generated to be scored; otherwise one forward pass is enough."""


@dataclass(frozen=True)
class StreamSize:
    """All tasks."""

    tasks: tuple[TaskSize, ...]
    basis: str
    """Where the numbers are from, as a sentence."""
    measured: bool
    """Whether they are those of the recipe's data."""

    @property
    def train(self) -> int:
        """Training samples."""
        return sum(task.train for task in self.tasks)

    @property
    def length(self) -> float:
        """Mean tokens of a training sample."""
        return sum(task.length * task.train for task in self.tasks) / max(1, self.train)

    @property
    def answer(self) -> float:
        """Mean tokens of an answer."""
        return sum(task.answer * task.train for task in self.tasks) / max(1, self.train)


@dataclass(frozen=True)
class StreamTime:
    """Seconds of a run, by part."""

    training: float
    evaluation: float
    checkpoints: float
    steps: int

    @property
    def hours(self) -> float:
        """All of it."""
        return (self.training + self.evaluation + self.checkpoints) / 3600


def read_tasks(recipe: Recipe, recipe_dir: Path) -> tuple[Task, ...] | str:
    """The recipe's data, or in a sentence why it cannot be read here.

    Args:
        recipe: The recipe, with its order resolved.
        recipe_dir: Where relative paths start.
    """
    try:
        return load_stream(recipe.stream, recipe_dir, recipe.train)
    except BadInput as error:
        return str(error).splitlines()[0]


def size_of(recipe: Recipe, shape: ModelShape, tasks: tuple[Task, ...] | str, samples: int | None) -> StreamSize | str:
    """The size of the recipe's stream, or why it is not known.

    Args:
        recipe: The recipe, with its order resolved.
        shape: The recipe's model.
        tasks: See `read_tasks`.
        samples: Training samples of each task; None: those of the data.

    Raises:
        BadInput: A task cannot be scored as the recipe says.
    """
    if samples is not None:
        return _assumed(recipe, samples)
    if isinstance(tasks, str):
        return tasks
    words = f"the recipe's data, {CHARACTERS_PER_TOKEN:g} characters a token (assumed)"
    return StreamSize(tuple(_size(task, recipe, shape) for task in tasks), words, measured=True)


def _assumed(recipe: Recipe, samples: int) -> StreamSize:
    """The recipe's tasks with `samples` samples each, as long as the recipe allows."""
    train, evaluation = recipe.train, recipe.stream.max_eval_samples or 0
    sizes = tuple(
        TaskSize(
            task.name,
            samples,
            evaluation,
            train.max_length,
            train.max_length if task.reader.only_documents else train.max_target_length,
        )
        for task in recipe.stream.tasks
    )
    scored = f"{evaluation} to score (stream.max_eval_samples)" if evaluation else "evaluation is not counted"
    words = f"--samples {samples} for each task ({len(sizes)}), of train.max_length tokens; {scored}"
    return StreamSize(sizes, words, measured=False)


def _size(task: Task, recipe: Recipe, shape: ModelShape) -> TaskSize:
    train = recipe.train
    mode = resolve_mode(task, shape.objective, recipe.eval)
    if task.kind == "text":  # documents are joined and cut into blocks
        own, scored = (
            math.ceil(sum(len(each.answer) for each in split) / CHARACTERS_PER_TOKEN / train.max_length)
            for split in (task.train, task.evaluation)
        )
        return TaskSize(task.name, own, scored, train.max_length, train.max_length, generates=False)
    prompts = [len(example.prompt) / CHARACTERS_PER_TOKEN for example in task.train]
    answers = [min(len(example.answer) / CHARACTERS_PER_TOKEN + 1, train.max_target_length) for example in task.train]
    apart = bool(getattr(base_model(shape.model).config, "is_encoder_decoder", False))
    both = zip(prompts, answers, strict=True)
    lengths = [min(train.max_length, prompt + (0 if apart else answer)) for prompt, answer in both]
    return TaskSize(
        task.name,
        len(task.train),
        len(task.evaluation),
        sum(lengths) / max(1, len(lengths)),
        sum(answers) / max(1, len(answers)),
        len(task.labels) if mode == "likelihood" else 0,
        generates=mode == "generate",
    )


def predict_stream(
    setup: Setup,
    stream: StreamSize,
    step_of: Callable[[float, float], StepTime],
    device: Device,
    arithmetic: Arithmetic,
    memory: Memory,
) -> StreamTime:
    """The time of the whole stream.

    Args:
        setup: The recipe and its ranks.
        stream: Its tasks.
        step_of: The time of a step on samples of a given length and answer, in tokens.
        device: What each rank trains on.
        arithmetic: The model's products.
        memory: Of the rank that needs most.
    """
    recipe = setup.recipe
    sizes = [task.train for task in stream.tasks]
    total, training, saves = 0, 0.0, 0
    for index, task in enumerate(stream.tasks):
        steps = planned_steps(recipe, index, sizes, setup.world)
        total += steps
        seconds = steps * step_of(task.length, task.answer).seconds
        training += seconds
        saves += _saves(recipe.checkpoint, steps, seconds)

    # One row of the matrix before training and one after each task; a row has all tasks, or those seen so far.
    spare = GATHERED_SHARE * (EFFICIENCY.usable_memory * device.memory - sum(memory.held.values()))
    each = [_evaluation_seconds(setup, task, device, arithmetic, spare) for task in stream.tasks]
    rows = range(1, len(each) + 1)
    scored = sum(sum(each[:row] if recipe.eval.tasks == "seen" else each) for row in rows)
    scored += sum(each) if recipe.eval.before_training else 0.0
    return StreamTime(training, scored, saves * memory.checkpoint / EFFICIENCY.storage, total)


def _saves(checkpoint: CheckpointConfig, steps: int, seconds: float) -> int:
    """Saved states of a task: one at its end, and those inside it, by steps or by time, whichever comes more often."""
    by_steps = steps // checkpoint.every_steps if checkpoint.every_steps else 0
    by_time = int(seconds / 60 / checkpoint.every_minutes) if checkpoint.every_minutes else 0
    return 1 + max(by_steps, by_time)


def _evaluation_seconds(setup: Setup, task: TaskSize, device: Device, arithmetic: Arithmetic, spare: float) -> float:
    """Scoring a task once: prompts and labels, or prompts and one pass over the weights per generated token.

    Under stage 3, the weights come from the other ranks: once if `eval.gather_weights` says so (`auto`: if they take at
    most `spare` bytes), otherwise for every forward pass.
    """
    evaluation, ranks = setup.recipe.eval, setup.world
    share = setup.ranks_per_node if device.kind == "cpu" else 1
    peak = device.peak(setup.recipe.train.dtype, setup.recipe.train.tf32) * EFFICIENCY.arithmetic / share
    read = arithmetic.shape.nbytes / (device.bandwidth * EFFICIENCY.memory / share)
    batches = -(-task.evaluation // (evaluation.batch_size * ranks)) if task.evaluation else 0
    one = replace(setup, length=max(1, round(task.length)), answer=1)
    flop = arithmetic.forward_flop(one) / setup.recipe.train.micro_batch_size * evaluation.batch_size
    prompt = max(flop / peak, read)
    if not task.generates:
        return batches * prompt * (1 + task.labels * LABEL_TOKENS / max(1.0, task.length))
    passes = batches * evaluation.max_new_tokens
    gather = _gather_seconds(setup, device, arithmetic.shape.nbytes)
    policy = evaluation.gather_weights
    whole = policy == "always" or (policy == "auto" and arithmetic.shape.nbytes <= spare)
    gathers = min(1, passes) if whole else passes
    return batches * prompt + passes * read + gathers * gather


def _gather_seconds(setup: Setup, device: Device, size: int) -> float:
    """Seconds to gather all weights of a sharded model."""
    if setup.stage < 3:
        return 0.0
    return collective_seconds(Collective("all_gather", size, "weights"), setup, device)


def counts(stream: StreamSize | str) -> Mapping[str, int] | None:
    """Training samples by task; None if they are not known."""
    return None if isinstance(stream, str) else {task.name: task.train for task in stream.tasks}
