"""Whether a warm-up ends within any task: known from the data, before a model is built."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

from cl_dist.config.schema import Recipe
from cl_dist.errors import BadInput
from cl_dist.tasks.types import Task


def check_warmup(recipe: Recipe, tasks: Sequence[Task], ranks: int) -> None:
    """Raise BadInput where no task has as many optimiser steps as `train.warmup_steps`.

    ranks: how many there are going to be. How many samples a plain text makes is known only once it is in tokens, so
    streams with one are not checked.
    """
    warmup = recipe.train.warmup_steps
    if warmup == 0 or any(task.kind == "text" for task in tasks):
        return
    most = max(_most_steps(recipe, tasks, index, ranks) for index in range(len(tasks)))
    if warmup > most:
        raise BadInput(
            f"train.warmup_steps: {warmup}, but the longest task has {most} optimiser steps, so that "
            f"train.learning_rate would never be reached; allowed: at most {most}"
        )


def _most_steps(recipe: Recipe, tasks: Sequence[Task], index: int, ranks: int) -> int:
    """Most steps that a task of the stream can have. Methods that learn past samples again, or all tasks at once, add
    at most the other tasks' samples.
    """
    train = recipe.train
    samples = len(tasks[index].train)
    if any(method.adds_samples for method in recipe.method):
        samples = sum(len(task.train) for task in tasks)
    epochs = recipe.stream.tasks[index].epochs or train.epochs
    steps = epochs * ceil(samples / (train.micro_batch_size * train.gradient_accumulation * ranks))
    steps = min(steps, train.max_steps_per_task or steps)
    return steps + sum(method.extra_steps(steps) for method in recipe.method)
