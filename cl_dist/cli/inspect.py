"""`cl-dist status`, `report`, `recipe` and `methods`: show what is there, and start no ranks."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cl_dist.cli.slurm import newest_job, status_lines
from cl_dist.config.fields import explain
from cl_dist.config.load import dump_recipe, load_recipe, shipped_recipes
from cl_dist.config.plugins import beside, load_plugins
from cl_dist.errors import BadInput
from cl_dist.methods.catalogue import summaries
from cl_dist.progress import format_matrix, format_summary, how_scored
from cl_dist.state.lock import InUse, refuse_if_locked
from cl_dist.state.manifest import Manifest
from cl_dist.state.run_folder import RunFolder
from cl_dist.state.stored_files import read_metrics
from cl_dist.tasks.orders import resolve_order


def add_commands(commands: Any, common: ArgumentParser, changes: ArgumentParser) -> None:
    """Add these commands; `commands` is argparse's collection of subparsers."""
    parser = commands.add_parser("status", parents=[common], help="show the progress of a run and its results so far")
    parser.add_argument("run", metavar="RUN", help="run folder")
    parser.set_defaults(command=status)
    parser = commands.add_parser("report", parents=[common], help="write tables and pictures of a run, finished or not")
    parser.add_argument("run", metavar="RUN", help="run folder")
    parser.add_argument("--out", metavar="DIR", type=Path, help="where to write them (default: RUN/report)")
    parser.set_defaults(command=report, works=lambda parsed: True)
    parser = commands.add_parser("recipe", parents=[changes, common], help="list, print or explain recipes")
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="print this recipe with all settings")
    parser.add_argument("--explain", action="store_true", help="explain every setting: values, default, meaning")
    add_plugins(parser)
    parser.set_defaults(command=recipe)
    parser = commands.add_parser("methods", parents=[common], help="list the methods")
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
        print("\n" + format_summary({**metrics, **of_run}))
    elif manifest.accuracy_matrix:
        matrix = format_matrix(manifest.tasks, manifest.accuracy_matrix)
        print("\n" + "\n".join([matrix, *how_scored(manifest.scoring_by_task()), *manifest.notes]))
    return 0


def report(arguments: Namespace) -> int:
    """Write the report; print the scores, what is missing, and the files."""
    from cl_dist.report.write import write_report

    done = write_report(Path(arguments.run), arguments.out)
    manifest = done.run.manifest
    if manifest.accuracy_matrix:
        print(format_matrix(manifest.tasks, manifest.accuracy_matrix) + "\n")
    for text in done.missing:
        print(text)
    for name in done.files:
        print(f"wrote {done.folder / name}")
    return 0


def recipe(arguments: Namespace) -> int:
    """Explain the settings, print a resolved recipe, or list the shipped ones."""
    with beside(Path.cwd()):
        load_plugins(arguments.plugins)
    if arguments.explain:
        print(explain())
    elif arguments.recipe is not None:
        print(dump_recipe(resolve_order(*load_recipe(arguments.recipe, arguments.changes))), end="")
    elif arguments.changes:
        raise BadInput("--set: no recipe to change; name one, as in: cl-dist recipe quickstart --set train.epochs=1")
    else:
        _print_table(shipped_recipes())
    return 0


def methods(arguments: Namespace) -> int:
    """Print each method's name and what it is, plugins and what installed packages offer included."""
    with beside(Path.cwd()):
        load_plugins(arguments.plugins)
    _print_table(summaries())
    return 0


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
    width = max(map(len, rows))
    for name, text in rows.items():
        print(f"{name:<{width}}  {text}")
