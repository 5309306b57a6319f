"""`cl-dist plan`: what a recipe needs on machines that are not here yet. Needs no GPU, data, weights or network."""

from __future__ import annotations

import json
import os
import shutil
from argparse import ArgumentParser, Namespace
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cl_dist.cli.parser import Help
from cl_dist.config.files import expand
from cl_dist.config.load import load_recipe
from cl_dist.config.schema import Recipe
from cl_dist.errors import BadInput
from cl_dist.planning.devices import Device, find_device
from cl_dist.progress import waiting
from cl_dist.state.atomic import advising, write_text
from cl_dist.tasks.orders import resolve_order

if TYPE_CHECKING:
    from cl_dist.planning.plan import Planner

MOST_RANKS = 100_000
WIDE = 120
"""Columns from which on the table of alternatives has more of them."""

_DESCRIPTION = """\
Predict what a recipe needs on N nodes with G devices each: memory per rank, bytes on the network, time per step and for
the whole stream, checkpoints; list what else would fit, and recommend the fastest. With --dry-run, also go through the
index arithmetic of all ranks, and report what would not work. docs/scaling.md has the formulas and what they assume.
"""
_EPILOG = """\
examples:
  cl-dist plan llama2-7b-migu --nodes 1 --gpus-per-node 8 --device h100
  cl-dist plan my.yaml --nodes 4 --device a100-40 --write my-plan.yaml
  cl-dist plan llama2-7b-migu --nodes 128 --gpus-per-node 8 --dry-run

exit codes: 0 planned (whether it fits or not), 1 the dry run found what would not work, 2 bad input
"""


def add_commands(commands: Any, common: ArgumentParser, changes: ArgumentParser) -> None:
    """Add `plan`; `commands` is argparse's collection of subparsers."""
    parser = commands.add_parser(
        "plan",
        parents=[changes, common],
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=Help,
    )
    parser.add_argument("recipe", metavar="RECIPE", help="name of a shipped recipe, or a YAML file")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="number of nodes (default: 1)")
    parser.add_argument(
        "--gpus-per-node", type=int, default=8, metavar="G", help="devices, hence ranks, per node (default: 8)"
    )
    parser.add_argument(
        "--device", default="h100", metavar="NAME", help="what a rank trains on, such as a100-80 or cpu (default: h100)"
    )
    parser.add_argument(
        "--samples", type=int, metavar="N", help="training samples of each task (default: those of the recipe's data)"
    )
    parser.add_argument("--dry-run", action="store_true", help="go through the arithmetic of all ranks as well")
    parser.add_argument("--write", metavar="FILE", help="write the recommended recipe, with the reasons, to a new file")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.set_defaults(command=plan, works=lambda parsed: parsed.write is not None)


def plan(arguments: Namespace) -> int:
    """Plan the recipe, and print the result."""
    _check_numbers(arguments)
    target = None if arguments.write is None else _new_file(arguments.write)
    recipe, recipe_dir = load_recipe(arguments.recipe, arguments.changes)
    recipe = resolve_order(recipe, recipe_dir)
    device = find_device(arguments.device)
    device.peak(recipe.train.dtype)  # refuses a precision that the device does not have
    # Before transformers and DeepSpeed are imported: a plan never asks the network, nor for this machine's devices.
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

    name = Path(arguments.recipe).stem
    with waiting(f"planning {name}"):
        from cl_dist.planning import report
        from cl_dist.planning.dry_run import dry_run
        from cl_dist.planning.stream_time import counts

        planner = _planner(arguments, recipe, recipe_dir, device)
        found = dry_run(planner.setup, planner.shape, counts(planner.stream)) if arguments.dry_run else None
        own, others = planner.plan(planner.setup), planner.alternatives()
    best = next((each for each in others if each.fits), None)
    if target is not None:
        if best is None:
            raise BadInput(
                f"--write: nothing that was considered fits on {planner.device.title}; use more or larger ones"
            )
        with advising("nothing was written"):
            write_text(target, report.recipe_text(best, own, name))
    if arguments.json:
        print(json.dumps(report.as_json(planner, own, others, best, found), indent=2))
    else:
        columns = shutil.get_terminal_size().columns
        print("\n".join(report.lines(planner, own, others, best, found, name, wide=columns >= WIDE)))
        if target is not None:
            print(f"\nwrote {target}")
    return int(found is not None and not found.works)


def _check_numbers(arguments: Namespace) -> None:
    for option in ("nodes", "gpus_per_node", "samples"):
        value = getattr(arguments, option)
        if value is not None and value < 1:
            raise BadInput(f"--{option.replace('_', '-')}: {value} is not allowed; allowed: a whole number from 1")
    if arguments.nodes * arguments.gpus_per_node > MOST_RANKS:
        ranks = arguments.nodes * arguments.gpus_per_node
        raise BadInput(f"--nodes: {ranks} ranks are too many to plan; allowed: at most {MOST_RANKS}")


def _new_file(name: str) -> Path:
    path = expand(name, "--write")
    if path.suffix not in (".yaml", ".yml"):
        raise BadInput(f"--write: {name} is not a YAML file; allowed: a new file that ends in .yaml or .yml")
    if os.path.lexists(path):
        raise BadInput(f"--write: {path} exists already; name a new file")
    if not path.absolute().parent.is_dir():
        raise BadInput(f"--write: there is no folder {path.absolute().parent}")
    return path


def _planner(arguments: Namespace, recipe: Recipe, recipe_dir: Path, device: Device) -> Planner:
    from cl_dist.models.published import known_config
    from cl_dist.planning.plan import Planner
    from cl_dist.planning.setup import Setup
    from cl_dist.planning.shape import describe_model
    from cl_dist.planning.stream_time import read_tasks, size_of

    tasks = read_tasks(recipe, recipe_dir)
    labels = {label for task in tasks for label in task.labels} if not isinstance(tasks, str) else ()
    setup = Setup(recipe, arguments.nodes, arguments.gpus_per_node, device.kind, labels=len(labels) or 2)
    config = known_config(recipe.model)
    shape = describe_model(recipe, config, setup.labels)
    stream = size_of(recipe, shape, tasks, arguments.samples)
    if not isinstance(stream, str):
        setup = replace(setup, samples=stream.train)
    describe = partial(describe_model, config=config)
    return Planner(setup, shape, device, stream, describe, published=config is not None)
