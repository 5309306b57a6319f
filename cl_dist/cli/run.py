"""`cl-dist run`: train a model through the recipe's stream."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser, Namespace
from functools import partial
from pathlib import Path
from typing import Any

from cl_dist.cli.failures import end_now
from cl_dist.cli.ranks import run_on_ranks, told_by_first_rank, told_once_per_machine
from cl_dist.config.boundary import refusing
from cl_dist.config.load import load_recipe
from cl_dist.config.schema import Recipe
from cl_dist.launch.environment import find_ranks
from cl_dist.launch.scheduler import TimeLeft
from cl_dist.progress import Reporter
from cl_dist.tasks.orders import resolve_order


def add_commands(commands: Any, common: ArgumentParser, changes: ArgumentParser) -> None:
    """Add `run`; `commands` is argparse's collection of subparsers."""
    parser = commands.add_parser("run", parents=[changes, common], help="train a model through a stream of tasks")
    parser.add_argument("recipe", metavar="RECIPE", help="a shipped recipe's name or a YAML file")
    parser.add_argument("--resume", action="store_true", help="go on with the run in output_dir")
    parser.add_argument("--fresh", action="store_true", help="put the run in output_dir aside and start anew")
    parser.set_defaults(command=run)


def run(arguments: Namespace) -> int:
    """Check the recipe, its data, its model and its run folder, then train."""
    with told_once_per_machine():
        recipe, recipe_dir = load_recipe(arguments.recipe, arguments.changes)
    recipe = resolve_order(recipe, recipe_dir)
    check = partial(_check, recipe, recipe_dir, arguments.resume, arguments.fresh)
    work = partial(_train, recipe, recipe_dir, arguments.resume)
    return run_on_ranks(arguments, recipe.launch.processes, check, work, recipe.launch.hang_seconds)


def check_stream_and_model(recipe: Recipe, recipe_dir: Path) -> None:
    """Raise BadInput where the data or the model cannot be used, as far as that shows without torch."""
    with refusing("stream"):
        _check_stream_and_model(recipe, recipe_dir)


def _check_stream_and_model(recipe: Recipe, recipe_dir: Path) -> None:
    from cl_dist.evaluation.choice import resolve_mode
    from cl_dist.evaluation.general import check_available
    from cl_dist.models.check import check_chat_template, check_model_config, known_objective
    from cl_dist.tasks.encode import check_kind
    from cl_dist.tasks.stream import load_stream
    from cl_dist.tasks.warmup import check_warmup

    tasks = load_stream(recipe.stream, recipe_dir)
    with refusing("model.name_or_path"):
        check_model_config(recipe.model, [label for task in tasks for label in task.labels])
    if recipe.train.template == "chat":
        check_chat_template(recipe.model)
    if recipe.eval.general is not None:
        check_available(recipe.eval.general)
    ranks = find_ranks(os.environ)
    check_warmup(recipe, tasks, recipe.launch.processes if ranks is None else ranks.world_size)
    objective = known_objective(recipe.model)
    if objective is None:  # only loading the model will tell
        return
    for task in tasks:
        check_kind(task, objective)
        resolve_mode(task, objective, recipe.eval)


def _check(recipe: Recipe, recipe_dir: Path, resume: bool, fresh: bool, first: bool) -> None:
    from cl_dist.state.preflight import preflight, set_aside

    check_stream_and_model(recipe, recipe_dir)
    if first:
        output_dir = Path(recipe.output_dir)
        ranks = find_ranks(os.environ)
        world_size = recipe.launch.processes if ranks is None else ranks.world_size
        tell = partial(print, file=sys.stderr, flush=True)
        preflight(output_dir, recipe, resume=resume, fresh=fresh, world_size=world_size, tell=tell)
        if fresh:
            set_aside(output_dir)


def _train(recipe: Recipe, recipe_dir: Path, resume: bool, reporter: Reporter) -> None:
    from cl_dist.coordinator import run

    time_left = TimeLeft(os.environ)
    run(
        recipe,
        recipe_dir,
        resume=resume,
        reporter=reporter,
        end=end_now,
        seconds_left=time_left,
        told_once=told_by_first_rank,
    )
