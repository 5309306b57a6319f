"""Which way of scoring fits which task and model. Imports no torch, so that a recipe can be checked in a second."""

from __future__ import annotations

from cl_dist.config.objectives import FACTS, Mode, ObjectiveName
from cl_dist.config.schema import EvalConfig
from cl_dist.config.words import listed
from cl_dist.errors import BadInput
from cl_dist.tasks.formats.catalogue import known_formats
from cl_dist.tasks.types import Task


def resolve_mode(task: Task, objective: ObjectiveName, config: EvalConfig) -> Mode:
    """The mode that a task is scored in; raises BadInput where the task or the model does not allow it."""
    mode = _default_mode(task) if config.mode == "auto" else config.mode
    where = f"eval.mode {mode}: task {task.name!r}"
    if mode not in FACTS[objective].modes:
        allowed = listed(FACTS[objective].modes, last="or")
        raise BadInput(
            f"{where} cannot be scored so with a {objective} model, which allows {allowed} (model.objective)"
        )
    if mode == "likelihood" and not task.labels:
        raise BadInput(f"{where} has no labels to choose from; give the task `labels`, or use generate or auto")
    if config.metric == "macro_f1" and not task.labels:
        raise BadInput(f"eval.metric macro_f1: task {task.name!r} has no labels, whose F1 it is; give it `labels`")
    if config.metric == "jga" and not has_slots(task):
        with_slots = listed([name for name, cls in known_formats() if cls.METRIC == "jga"], last="and")
        raise BadInput(
            f"eval.metric jga: task {task.name!r} has no turns whose slots it counts; it is for format {with_slots}"
        )
    if mode == "generate" and task.kind == "text":
        raise BadInput(f"{where} is plain text without prompts to answer; use perplexity or auto")
    if mode == "perplexity" and task.kind != "text":
        raise BadInput(f"{where} is a {task.kind} task, and perplexity is for text; use auto")
    return mode


def resolve_metric(task: Task, mode: Mode, config: EvalConfig) -> str:
    """The name of the score that a task has in a mode that `resolve_mode` gave."""
    if mode == "perplexity":
        return "log_likelihood"
    return default_metric(task) if config.metric == "auto" else config.metric


def default_metric(task: Task) -> str:
    """What `auto` means for a task with prompts and answers."""
    if has_slots(task):
        return "jga"
    return "exact_match" if task.labels else "rouge_l"


def has_slots(task: Task) -> bool:
    """Whether every evaluation sample says which slot of which turn it asks for."""
    return all(example.slot is not None for example in task.evaluation)


def _default_mode(task: Task) -> Mode:
    """What `auto` means for a task."""
    if task.labels:
        return "likelihood"
    return "perplexity" if task.kind == "text" else "generate"
