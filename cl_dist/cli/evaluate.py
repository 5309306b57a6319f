"""`cl-dist eval`: scores a model that a run has saved."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from cl_dist.cli.ranks import number_of_ranks, reported_once_per_machine, run_on_ranks, with_ranks
from cl_dist.cli.run import check_stream_and_model
from cl_dist.config.load import load_recipe
from cl_dist.config.schema import Recipe
from cl_dist.progress import Reporter
from cl_dist.state.inputs import Inputs, input_changes, read_inputs, with_data
from cl_dist.state.manifest import Manifest
from cl_dist.state.run_folder import RunFolder
from cl_dist.state.saved_models import saved_index, where_it_is_now
from cl_dist.stop_requests import imports


def add_commands(commands: Any, common: ArgumentParser, changes: ArgumentParser) -> None:
    """Add `eval`; `commands` is argparse's collection of subparsers."""
    parser = commands.add_parser("eval", parents=[changes, common])
    parser.add_argument("run", metavar="RUN", help="run folder")
    parser.add_argument("--task", metavar="NAME", help="use the model after this task (default: the last finished one)")
    parser.set_defaults(command=evaluate, works=lambda parsed: True)


def evaluate(arguments: Namespace) -> int:
    """Check that the run has the model, then evaluate it on the recipe's tasks."""
    folder = RunFolder(Path(arguments.run))
    with reported_once_per_machine():
        manifest = Manifest.read(folder.manifest)
        index = saved_index(manifest, arguments.task, folder.path)
        recipe, recipe_dir = load_recipe(str(folder.config), arguments.changes)
        recipe = with_ranks(recipe)
    recipe = where_it_is_now(recipe, manifest, folder.path)
    check = partial(_check, recipe, recipe_dir, manifest.inputs, folder.task(index, manifest.tasks[index]).model)
    work = partial(_evaluate, recipe, recipe_dir, index)
    return run_on_ranks(arguments, number_of_ranks(recipe), check, work, recipe.launch.hang_seconds)


def _check(recipe: Recipe, recipe_dir: Path, inputs: Inputs | None, model: Path, first: bool) -> None:
    """Raise BadInput if evaluation is impossible; print where the data or an adapter's base model has changed."""
    from cl_dist.models.hub import check_published

    trained_whole = recipe.model.lora is None
    source = replace(recipe.model, name_or_path=str(model), gguf_file=None) if trained_whole else recipe.model
    tasks = check_stream_and_model(replace(recipe, model=source), recipe_dir)
    check_published(source, partial(print, file=sys.stderr, flush=True) if first else None)
    if not first or inputs is None:
        return
    # What a method measured matters to training alone.
    inputs = replace(inputs, data={task.name: inputs.data[task.name] for task in tasks if task.name in inputs.data})
    now = with_data(inputs, tasks) if trained_whole else read_inputs(recipe, tasks)
    for change in [] if now is None else input_changes(inputs, now, tasks):
        print(f"input has changed since the run: {change}", file=sys.stderr, flush=True)


def _evaluate(recipe: Recipe, recipe_dir: Path, index: int, reporter: Reporter) -> None:
    reporter.phase("importing torch and transformers")
    with imports():
        from cl_dist.coordinator import evaluate

    evaluate(recipe, recipe_dir, task_index=index, reporter=reporter)
