"""`cl-dist status`, `recipe` and `methods`: show what is there, and start no ranks."""

from __future__ import annotations

import re
import textwrap
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from inspect import getdoc
from pathlib import Path
from typing import Any

from cl_dist.cli.slurm import newest_job, status_lines
from cl_dist.config.fields import WIDTH, explain, settings_of
from cl_dist.config.json_schema import render_schema
from cl_dist.config.load import dump_recipe, load_recipe, shipped_recipes, shipped_text
from cl_dist.config.plugins import beside, load_plugins
from cl_dist.config.words import listed, show
from cl_dist.errors import BadInput
from cl_dist.methods.catalogue import known, summaries
from cl_dist.methods.config import exclusion
from cl_dist.output import terminal_columns
from cl_dist.progress import format_matrix, format_summary, how_scored
from cl_dist.state.lock import InUse, refuse_if_locked
from cl_dist.state.manifest import Manifest
from cl_dist.state.run_folder import RunFolder
from cl_dist.state.stored_files import read_metrics
from cl_dist.tasks.orders import resolve_order


def add_commands(commands: Any, common: ArgumentParser, changes: ArgumentParser) -> None:
    """Add these commands; `commands` is argparse's collection of subparsers."""
    parser = commands.add_parser("status", parents=[common])
    parser.add_argument("run", metavar="RUN", help="run folder")
    parser.set_defaults(command=status)
    parser = commands.add_parser("recipe", parents=[changes, common])
    parser.add_argument(
        "recipe",
        nargs="?",
        metavar="RECIPE",
        help="print this recipe: a shipped one as it is, with its comments, to start from; a file, or a recipe with "
        "changes, with all settings",
    )
    parser.add_argument("--all", action="store_true", help="print a shipped recipe with all settings, too")
    parser.add_argument(
        "--explain",
        nargs="?",
        const="",
        metavar="KEY",
        help="explain settings: values, default, meaning; with KEY, such as train. or migu, those that start with it",
    )
    parser.add_argument("--schema", action="store_true", help="print a JSON Schema of recipes, for editors")
    add_plugins(parser)
    parser.set_defaults(command=recipe)
    parser = commands.add_parser("methods", parents=[common])
    parser.add_argument("names", nargs="*", metavar="NAME", help="show these, with the meaning of their settings")
    add_plugins(parser)
    parser.set_defaults(command=methods)


def add_plugins(parser: ArgumentParser) -> None:
    """Add `--plugin`."""
    parser.add_argument(
        "--plugin",
        action="append",
        default=[],
        metavar="MODULE",
        dest="plugins",
        help="a module of your own, by name or as the path of a .py file (may be given several times)",
    )


def status(arguments: Namespace) -> int:
    """Print the progress of a run and its scores so far."""
    folder = RunFolder(Path(arguments.run))
    job = newest_job(folder)
    if job is not None and not folder.manifest.exists():
        print("\n".join(["status      not started", *status_lines(job)]))
        return 0
    manifest = Manifest.read(folder.manifest)
    metrics = _metrics(folder, manifest)
    # The lock may be invisible from this machine, but then Slurm knows.
    running = _is_running(folder) or (job is not None and job.state is not None and job.state.state == "RUNNING")
    print("\n".join([*_progress_lines(manifest, running), *(() if job is None else status_lines(job))]))
    if metrics is not None:
        of_run = {**manifest.scoring_by_task(), "tasks": manifest.tasks, "general": manifest.general}
        print("\n" + format_summary({**metrics, **of_run}, terminal_columns()))
    elif manifest.accuracy_matrix:
        matrix = format_matrix(manifest.tasks, manifest.accuracy_matrix, terminal_columns())
        print("\n" + "\n".join([matrix, *how_scored(manifest.scoring_by_task()), *manifest.notes]))
    return 0


def recipe(arguments: Namespace) -> int:
    """Explain the settings, print their schema or a recipe, or list the shipped ones."""
    with beside(Path.cwd()):
        load_plugins(arguments.plugins)
    shipped = None if arguments.changes or arguments.all else shipped_text(arguments.recipe or "")
    if arguments.explain is not None or arguments.schema:
        _refuse_recipe(arguments)
        print(render_schema() if arguments.schema else explain(arguments.explain, terminal_columns()))
    elif shipped is not None:
        print(shipped, end="")
    elif arguments.recipe is not None:
        print(dump_recipe(resolve_order(*load_recipe(arguments.recipe, arguments.changes))), end="")
    elif arguments.all:
        raise BadInput("--all: no recipe to print; name one, as in: cl-dist recipe quickstart --all")
    elif arguments.changes:
        raise BadInput("--set: no recipe to change; name one, as in: cl-dist recipe quickstart --set train.epochs=1")
    else:
        _print_table(shipped_recipes())
    return 0


def _refuse_recipe(arguments: Namespace) -> None:
    """Refuse what `--explain` and `--schema` would ignore."""
    option = "--schema" if arguments.schema else "--explain"
    given = arguments.recipe or ("--set" if arguments.changes else "--all" if arguments.all else None)
    if arguments.schema and arguments.explain is not None:
        given = "--explain"
    if given is not None:
        raise BadInput(f"{option}: is about the settings of all recipes, so {given} has no effect; leave it out")


def methods(arguments: Namespace) -> int:
    """Print what each method is, its settings, what it composes with and its source; or all about some of them."""
    with beside(Path.cwd()):
        load_plugins(arguments.plugins)
    if not arguments.names:
        print("\n\n".join("\n".join(_about_method(name)) for name in summaries()))
        return 0
    for name in arguments.names:
        if name not in summaries():
            raise BadInput(f"methods: there is no method {show(name)}; allowed: {listed(summaries())}")
    texts = [
        "\n".join([*_about_method(name), "", explain(f"method({name}).", terminal_columns())])
        for name in arguments.names
    ]
    print("\n\n".join(texts))
    return 0


def _about_method(name: str) -> Iterator[str]:
    """The lines about a method. Of an installed package's method that is not loaded, only the summary is known."""
    yield name
    summary = summaries()[name]
    yield from _entry(summary)
    settings = known().get(name)
    if settings is None:
        return
    own = [each for each in settings_of(settings) if each.name not in ("name", "by_task")]
    varied = getattr(settings, "VARIED", ())
    if own:
        defaults = (f"{each.name} ({'must be given' if each.default is None else each.default})" for each in own)
        yield from _entry(f"settings: {listed(defaults)}")
    if varied:
        yield from _entry(f"may differ by task: {listed(varied)}")
    excluded: dict[str, list[str]] = {}
    for other, cls in known().items():
        why = exclusion(settings, cls)
        if why is not None:
            excluded.setdefault(why, []).append(other)
    others = [other for other in known() if other != name and not any(other in each for each in excluded.values())]
    yield from _entry(f"composes with: {listed(others) or 'no other method'}")
    for why, names in excluded.items():
        yield from _entry(f"not with {listed(names, last='and')}: {why}")
    sources = re.findall(r"arXiv (\d+\.\d+)", getdoc(settings) or "")
    if sources:
        yield from _entry(f"source: {listed(f'https://arxiv.org/abs/{each}' for each in sources)}")


def _entry(text: str) -> list[str]:
    width = min(WIDTH, terminal_columns() or WIDTH)
    return textwrap.wrap(text, width, initial_indent="    ", subsequent_indent="        ", break_on_hyphens=False)


def _progress_lines(manifest: Manifest, running: bool) -> Iterator[str]:
    # A killed run had no time to replace "running".
    status = "killed" if manifest.status == "running" and not running else manifest.status
    yield f"status      {status}{'; continue with --resume' if status in ('killed', 'interrupted', 'failed') else ''}"
    yield f"tasks done  {manifest.completed} of {len(manifest.tasks)}"
    if manifest.checkpoint is not None:
        name = manifest.tasks[manifest.checkpoint.task]
        yield f"checkpoint  in {name}, after step {manifest.checkpoint.step}"
    yield f"ranks       {manifest.world_size}, ZeRO stage {manifest.zero_stage}"
    yield f"restarts    {manifest.restarts}"


def _is_running(folder: RunFolder) -> bool:
    try:
        refuse_if_locked(folder.lock)
    except InUse:
        return True
    return False


def _metrics(folder: RunFolder, manifest: Manifest) -> dict[str, Any] | None:
    """The metrics of a finished run; `BadInput` if the file is damaged or belongs to another stream."""
    if not folder.metrics.exists():
        return None
    metrics = read_metrics(folder.metrics)
    if any(len(row) != len(manifest.tasks) for row in metrics["accuracy_matrix"]):
        raise BadInput(f"{folder.metrics} is damaged: its rows must have {len(manifest.tasks)} scores, one per task")
    return metrics


def _print_table(rows: dict[str, str]) -> None:
    width, columns = max(map(len, rows)) + 2, terminal_columns()
    for name, text in rows.items():
        # On a terminal, a text that is too long continues below itself.
        room = None if columns is None else max(20, columns - width)
        for number, line in enumerate([text] if room is None else textwrap.wrap(text, room)):
            print(f"{'' if number else name:<{width}}{line}")
