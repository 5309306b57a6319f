"""Which mode and metric a task is scored with. Imports no torch, so that a recipe can be checked in a second."""

from __future__ import annotations

from cl_dist.config.objectives import FACTS, Mode, ObjectiveName
from cl_dist.config.schema import EvalConfig
from cl_dist.config.words import listed
from cl_dist.errors import BadInput
from cl_dist.tasks.formats.catalogue import known_formats
from cl_dist.tasks.types import Task


def resolve_mode(task: Task, objective: ObjectiveName, config: EvalConfig) -> Mode:
    """The mode in which a task is scored. Raises `BadInput` if the task or the model's objective does not allow it."""
    mode = config.mode
    if mode == "auto":
        mode = "likelihood" if task.labels else "perplexity" if task.kind == "text" else "generate"
    where = f"eval.mode {mode}: task {task.name!r}"
    if mode not in FACTS[objective].modes:
        allowed = listed(FACTS[objective].modes, last="or")
        raise BadInput(
            f"{where} cannot be scored this way with a {objective} model, which allows {allowed} (model.objective)"
        )
    if mode == "likelihood" and not task.labels:
        raise BadInput(f"{where} has no labels to choose from; give the task `labels`, or use generate or auto")
    if config.metric == "macro_f1" and not task.labels:
        raise BadInput(f"eval.metric macro_f1: task {task.name!r} has no labels to take the F1 of; give it `labels`")
    if config.metric == "jga" and not has_slots(task):
        with_slots = listed([name for name, cls in known_formats() if cls.METRIC == "jga"], last="and")
        raise BadInput(
            f"eval.metric jga: task {task.name!r} has no dialogue turns with slots; use it with format {with_slots}"
        )
    if mode == "generate" and task.kind == "text":
        raise BadInput(f"{where} is plain text without prompts to answer; use perplexity or auto")
    if mode == "perplexity" and task.kind != "text":
        raise BadInput(f"{where} is a {task.kind} task, and perplexity is for text; use auto")
    return mode


def resolve_metric(task: Task, mode: Mode, config: EvalConfig) -> str:
    """The metric of a task in the mode that `resolve_mode` returned."""
    if mode == "perplexity":
        return "log_likelihood"
    return default_metric(task) if config.metric == "auto" else config.metric


def default_metric(task: Task) -> str:
    """The metric `auto` for a task with prompts and answers."""
    if has_slots(task):
        return "jga"
    return "exact_match" if task.labels else "rouge_l"


def has_slots(task: Task) -> bool:
    """Whether every evaluation sample names the slot and turn it asks for."""
    return all(example.slot is not None for example in task.evaluation)
