"""`cl-dist run`: trains a model on the recipe's stream of tasks."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser, Namespace
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from cl_dist.cli.failures import end_now
from cl_dist.cli.ranks import (
    number_of_ranks,
    reported_by_first_rank,
    reported_once_per_machine,
    run_on_ranks,
    with_ranks,
)
from cl_dist.config.boundary import refusing
from cl_dist.config.load import load_recipe
from cl_dist.config.schema import Recipe
from cl_dist.errors import ClDistError
from cl_dist.launch.child import is_launched
from cl_dist.launch.environment import find_ranks
from cl_dist.launch.scheduler import TimeLeft
from cl_dist.machine import describe_devices
from cl_dist.progress import Reporter, count
from cl_dist.state.run_folder import RunFolder
from cl_dist.state.stored_files import kept_defaults
from cl_dist.stop_requests import imports
from cl_dist.tasks.orders import resolve_order
from cl_dist.tasks.types import Task


def add_commands(commands: Any, common: ArgumentParser, changes: ArgumentParser) -> None:
    """Add `run`; `commands` is argparse's collection of subparsers."""
    parser = commands.add_parser("run", parents=[changes, common])
    parser.add_argument("recipe", metavar="RECIPE", help="name of a shipped recipe, or a YAML file")
    parser.add_argument("--resume", action="store_true", help="continue the run in output_dir")
    parser.add_argument("--fresh", action="store_true", help="move the run in output_dir aside and start a new one")
    parser.set_defaults(command=run, works=lambda parsed: True)


def run(arguments: Namespace) -> int:
    """Check the recipe, its data, its model and its run folder, then train."""
    with reported_once_per_machine():
        recipe, recipe_dir = load_recipe(arguments.recipe, arguments.changes)
        if arguments.resume:  # with the defaults of the release that started the run
            kept = kept_defaults(RunFolder(Path(recipe.output_dir)).config)
            recipe, recipe_dir = load_recipe(arguments.recipe, arguments.changes, kept)
        recipe = with_ranks(recipe)
    recipe = resolve_order(recipe, recipe_dir)
    _print_first_line(arguments.recipe, recipe)
    check = partial(_check, recipe, recipe_dir, arguments.resume, arguments.fresh)
    work = partial(_train, recipe, recipe_dir, arguments.resume)
    note = partial(_note_lost_output, RunFolder(Path(recipe.output_dir)))
    return run_on_ranks(arguments, number_of_ranks(recipe), check, work, recipe.launch.hang_seconds, note)


def _print_first_line(name: str, recipe: Recipe) -> None:
    """Print what is about to run, before anything that takes time; once for all ranks."""
    ranks = find_ranks(os.environ)
    if ranks is not None and (ranks.rank > 0 or is_launched(os.environ)):
        return
    methods = " + ".join(method.name for method in recipe.method)
    number = number_of_ranks(recipe)
    kind = describe_devices(recipe.launch.device, os.environ)
    print(f"{name}: {recipe.model.name_or_path}, {count(len(recipe.stream.tasks), 'task')}, {methods}")
    print(f"{count(number, 'rank')}{f' on {kind}' if kind else ''}, output in {recipe.output_dir}", flush=True)


def check_stream_and_model(recipe: Recipe, recipe_dir: Path) -> tuple[Task, ...]:
    """Read and return the data.

    Raises BadInput if the data or the model cannot be used, as far as can be known without torch.
    """
    with refusing("stream"):
        return _check_stream_and_model(recipe, recipe_dir)


def _check_stream_and_model(recipe: Recipe, recipe_dir: Path) -> tuple[Task, ...]:
    from cl_dist.evaluation.general import check_available
    from cl_dist.evaluation.modes import resolve_mode
    from cl_dist.evaluation.rouge_tokens import rouge_tokenizer
    from cl_dist.models.check import check_chat_template, check_model_config, check_positions, known_objective
    from cl_dist.tasks.encode import check_kind
    from cl_dist.tasks.stream import check_warmup, load_stream

    tasks = load_stream(recipe.stream, recipe_dir, recipe.train)
    with refusing("model.name_or_path"):
        check_model_config(recipe.model, [label for task in tasks for label in task.labels])
        check_positions(recipe.model, recipe.train)
    if recipe.train.template == "chat":
        check_chat_template(recipe.model)
    if recipe.eval.rouge_tokenizer == "xlingual":
        rouge_tokenizer("xlingual", recipe.eval.rouge_tokenizer_path)
    if recipe.eval.general is not None:
        check_available(recipe.eval.general)
    check_warmup(recipe, tasks, number_of_ranks(recipe))
    objective = known_objective(recipe.model)
    if objective is None:  # known only after loading the model
        return tasks
    for task in tasks:
        check_kind(task, objective)
        resolve_mode(task, objective, recipe.eval)
    return tasks


def _check(recipe: Recipe, recipe_dir: Path, resume: bool, fresh: bool, first: bool) -> None:
    from cl_dist.models.hub import check_published
    from cl_dist.state.inputs import read_inputs
    from cl_dist.state.preflight import preflight, set_aside
    from cl_dist.tasks.stream import load_method_data
    from cl_dist.tracking.tracker import check_trackers

    check_trackers(recipe.track)
    tasks = check_stream_and_model(recipe, recipe_dir)
    with refusing("method"):
        tasks = (*tasks, *load_method_data(recipe, recipe_dir).values())
    notify = partial(print, file=sys.stderr, flush=True)
    check_published(recipe.model, notify if first else None)
    if first:
        output_dir = Path(recipe.output_dir)
        inputs = partial(read_inputs, recipe, tasks)
        preflight(
            output_dir,
            recipe,
            resume=resume,
            fresh=fresh,
            world_size=number_of_ranks(recipe),
            notify=notify,
            tasks=tasks,
            inputs=inputs,
        )
        if fresh:
            set_aside(output_dir)


def _note_lost_output(folder: RunFolder, text: str) -> None:
    """Record in the run's log that some output was lost."""
    if folder.log.exists():
        with suppress(ClDistError):  # a full disk
            folder.append_log({"event": "output_lost", "message": text})


def _train(recipe: Recipe, recipe_dir: Path, resume: bool, reporter: Reporter) -> None:
    reporter.phase("importing torch and transformers")
    with imports():
        from cl_dist.coordinator import run

    time_left = TimeLeft(os.environ)
    run(
        recipe,
        recipe_dir,
        resume=resume,
        reporter=reporter,
        end=end_now,
        seconds_left=time_left,
        reported_once=reported_by_first_rank,
    )
