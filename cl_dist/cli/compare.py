"""`cl-dist compare`: runs a recipe with several methods, orders and seeds, and tabulates the results."""

from __future__ import annotations

import json
import os
import re
import sys
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from cl_dist.cli.cells import CellRunner
from cl_dist.cli.parser import Help
from cl_dist.cli.ranks import number_of_ranks, with_ranks, without_notices
from cl_dist.cli.report import add_figures
from cl_dist.cli.run import check_stream_and_model
from cl_dist.cli.slurm import add_job_options, make_job, newest_job, slurm
from cl_dist.config.boundary import refusing
from cl_dist.config.files import expand
from cl_dist.config.load import dump_recipe, load_recipe, to_dict
from cl_dist.errors import BadInput, ClDistError
from cl_dist.launch.environment import find_ranks
from cl_dist.launch.local import check_processes
from cl_dist.launch.scheduler import require_sbatch
from cl_dist.launch.slurm import job_name, quote
from cl_dist.progress import count
from cl_dist.state.atomic import advising, make_folder, write_text
from cl_dist.state.lock import RunLock
from cl_dist.sweep.checks import refuse_other_recipes, state_of
from cl_dist.sweep.folder import TABLES, SweepFolder
from cl_dist.sweep.grid import Cell, Grid, Request, build_grid
from cl_dist.sweep.names import Problems
from cl_dist.sweep.results import Results, read_results
from cl_dist.sweep.tables import render_tables

_DESCRIPTION = """\
Run a recipe with every combination of the given methods, orders and seeds, one run after the other, and write table.md,
table.csv and table.tex with mean and standard deviation over the seeds, and a page with curves, report/index.html. The
same command continues an unfinished sweep: it skips finished runs and resumes interrupted and failed ones.
docs/compare.md explains the folder and the table.
"""
_EPILOG = """\
examples:
  cl-dist compare standard-order1 --methods sequential,migu,kif \\
      --orders 1,2,3 --seeds 0,1,2 --out sweeps/standard
  cl-dist compare my.yaml --methods olora,olora+migu,random=migu \\
      --set-for random:method.selection=random --out sweeps/a
"""
_PLAIN = re.compile(r"/[A-Za-z0-9._/+-]+")


def add_commands(commands: Any, common: ArgumentParser, changes: ArgumentParser) -> None:
    """Add `compare`; `commands` is argparse's collection of subparsers."""
    parser = commands.add_parser(
        "compare",
        parents=[changes, common],
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=Help,
    )
    parser.add_argument("recipe", metavar="RECIPE", help="name of a shipped recipe, or a YAML file")
    parser.add_argument("--out", required=True, metavar="DIR", type=Path, help="folder for the runs and the tables")
    parser.add_argument(
        "--methods", metavar="A,B+C,NAME=D", help="methods; B+C composes, NAME=D names a row (default: the recipe's)"
    )
    parser.add_argument("--orders", metavar="1,2,3", help="published orders or order folders (default: the recipe's)")
    parser.add_argument("--seeds", metavar="0,1,2", help="values of train.seed (default: the recipe's)")
    parser.add_argument(
        "--set-for",
        action="append",
        default=[],
        metavar="METHOD:KEY=VALUE",
        dest="method_changes",
        help="change a setting for one entry of --methods only (may be repeated)",
    )
    parser.add_argument("--stop-on-failure", action="store_true", help="stop after the first run that fails")
    add_figures(parser)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--dry-run", action="store_true", help="check everything and list the runs")
    what.add_argument("--print", action="store_true", help="print a command for every unfinished run")
    what.add_argument("--table", action="store_true", help="write the tables of the results so far, run nothing")
    what.add_argument("--submit", action="store_true", help="submit a Slurm job for every unfinished run")
    add_job_options(parser.add_argument_group("with --submit", "as in cl-dist slurm"))
    parser.set_defaults(command=compare, works=_works)


def _works(arguments: Namespace) -> bool:
    """Whether this call runs or submits something, rather than only printing."""
    return not (arguments.dry_run or arguments.print or arguments.table)


def compare(arguments: Namespace) -> int:
    """Check the whole grid, then list, print, submit or run it; write the tables."""
    if find_ranks(os.environ) is not None:
        raise BadInput("cl-dist compare starts the ranks of its runs itself; run it without torchrun, mpirun or srun")
    arguments.out = expand(str(arguments.out), "--out")
    with advising("free some space; the same command continues"):
        return _compare(arguments)


def _compare(arguments: Namespace) -> int:
    sweep = SweepFolder(arguments.out)
    with refusing("--out"):
        sweep.require_own()
    if arguments.submit:
        require_sbatch()
    # From cheap to expensive: names and recipes, then earlier runs, then data and models.
    grid = build_grid(_request(arguments))
    refuse_other_recipes(sweep, grid)
    refresh = partial(_write_tables, sweep, grid, Path(arguments.recipe).stem)
    if arguments.table:
        refresh()
        print((sweep.path / "table.md").read_text(encoding="utf-8"), end="")
        print(f"\nwrote {_write_page(sweep, grid, arguments)}")
        return 0
    if not (arguments.print or arguments.dry_run):
        runs, out = count(len(grid.cells), "run"), sweep.path
        print(f"{arguments.recipe}: {runs}, output in {out}\nchecking data and models", flush=True)
    with without_notices():
        _check_data_and_models(grid.cells)
    if arguments.print:
        print("\n".join(_commands(grid.cells, arguments.recipe)))
    elif arguments.dry_run:
        print("\n".join(_listing(sweep, grid.cells)))
    elif arguments.submit:
        _submit(sweep, grid, arguments)
        refresh()
    else:
        from cl_dist.models.hub import check_published

        for cell in grid.cells:
            check_processes(number_of_ranks(cell.recipe))
        for model in dict.fromkeys(cell.recipe.model for cell in grid.cells):
            check_published(model, partial(print, file=sys.stderr, flush=True))
        _run(sweep, grid, refresh, arguments)
    return 0


def _request(arguments: Namespace) -> Request:
    request = Request(
        recipe=arguments.recipe,
        out=arguments.out,
        methods=arguments.methods,
        orders=arguments.orders,
        seeds=arguments.seeds,
        changes=arguments.changes,
        method_changes=arguments.method_changes,
    )
    # The number of ranks determines a cell's global batch, so it belongs in the recipe.
    base, _ = load_recipe(request.recipe, request.changes)
    if not (arguments.submit or arguments.dry_run or arguments.print or arguments.table):
        with_ranks(base)  # refuses GPUs that cannot be used, before the first run
    if arguments.submit:
        job = make_job(arguments, base)
        given = [f"launch.processes={job.ranks}", f"launch.device={job.device}"]
    elif base.launch.processes == "auto":
        given = [f"launch.processes={with_ranks(base).launch.processes}"]
    else:
        return request
    return replace(request, changes=[*request.changes, *given])


def _check_data_and_models(cells: Sequence[Cell]) -> None:
    """Raise `BadInput` if data or models cannot be used; what several cells share is read once."""
    problems, seen = Problems(), set()
    for cell in cells:
        data = to_dict(cell.recipe)
        del data["train"]["seed"]
        # With warm-up, the methods matter too: they determine how many steps a task has.
        methods = data["method"] if cell.recipe.train.warmup_steps else None
        # Cells that agree in these sections need only one check.
        key = json.dumps([*(data[section] for section in ("model", "stream", "eval", "train", "launch")), methods])
        if key not in seen:
            seen.add(key)
            try:
                check_stream_and_model(cell.recipe, cell.recipe_dir)
            except BadInput as error:
                problems.add(str(error))
    problems.check()


def _listing(sweep: SweepFolder, cells: Sequence[Cell]) -> Iterator[str]:
    states = [state_of(cell.folder) for cell in cells]
    counts = Counter(state.status for state in states)
    totals = ", ".join(f"{count} {status}" for status, count in counts.items())
    yield f"{len(cells)} runs in {sweep.runs}: {totals}"
    width = max(len(cell.name) for cell in cells)
    yield from (f"{cell.name:<{width}}  {state}" for cell, state in zip(cells, states, strict=True))


def _commands(cells: Sequence[Cell], recipe: str) -> Iterator[str]:
    """A shell command, for the current folder, for every unfinished cell."""
    for cell in cells:
        if not state_of(cell.folder).finished:
            path = cell.recipe.output_dir
            changes = [*cell.changes, f"output_dir={path if _PLAIN.fullmatch(path) else json.dumps(path)}"]
            words = ["cl-dist", "run", recipe, *(word for change in changes for word in ("--set", change))]
            words += ["--resume"] if cell.folder.manifest.exists() else []
            yield " ".join(map(quote, words))


def _run(sweep: SweepFolder, grid: Grid, refresh: partial[None], arguments: Namespace) -> None:
    _keep_base(sweep, grid)
    with RunLock(sweep.lock, partial(print, file=sys.stderr, flush=True)):
        print("\n".join(_listing(sweep, grid.cells)), flush=True)
        refresh()
        failures = CellRunner(sweep, refresh, ["--debug"] * arguments.debug).run(grid.cells, arguments.stop_on_failure)
        refresh()
    print("\n" + (sweep.path / "table.md").read_text(encoding="utf-8"), flush=True)
    # The page is drawn once, at the end: drawing takes seconds, and the tables are up to date after every run.
    written = [*(sweep.path / name for name in TABLES), _write_page(sweep, grid, arguments)]
    print(f"wrote {', '.join(map(str, written))}", flush=True)
    if failures:
        lines = [f"{failure.cell.name}: {failure.reason}" for failure in failures]
        lines.append(f"{len(failures)} of {len(grid.cells)} runs failed; the same command tries them again")
        raise ClDistError("\n".join(lines))


def _submit(sweep: SweepFolder, grid: Grid, arguments: Namespace) -> None:
    """Submit a job for every cell that is neither finished nor already in the queue."""
    _keep_base(sweep, grid)
    for cell in grid.cells:
        state, job = state_of(cell.folder), newest_job(cell.folder)
        if state.finished or state.status == "in use":
            print(f"{cell.name}: {state}")
            continue
        if job is not None and job.state is not None and job.state.is_alive:
            print(f"{cell.name}: job {job.number} is already {job.state.state}")
            continue
        # The job runs the cell's resolved recipe, so nothing is left to change on its command line.
        recipe = sweep.recipe(cell.order, cell.method, cell.seed)
        make_folder(recipe.parent)
        write_text(recipe, dump_recipe(cell.recipe))
        print(f"{cell.name}:", flush=True)
        own = {
            "recipe": str(recipe),
            "changes": [],
            "job_name": job_name("-".join(filter(None, [arguments.job_name, *cell.name.split()]))),
            "resume": cell.folder.manifest.exists(),
            "fresh": False,
        }
        slurm(Namespace(**{**vars(arguments), **own}))


def _keep_base(sweep: SweepFolder, grid: Grid) -> None:
    try:
        make_folder(sweep.path)
        if not sweep.base.exists():
            write_text(sweep.base, dump_recipe(grid.base))
    except OSError as error:
        raise BadInput(f"--out {sweep.path} cannot be written: {error.strerror}") from error


def _write_tables(sweep: SweepFolder, grid: Grid, recipe: str) -> None:
    sweep.write_tables(render_tables(_results(sweep, grid), recipe))


def _write_page(sweep: SweepFolder, grid: Grid, arguments: Namespace) -> Path:
    from cl_dist.sweep.page import write_page

    return write_page(_results(sweep, grid), Path(arguments.recipe).stem, sweep.report, arguments.figures)


def _results(sweep: SweepFolder, grid: Grid) -> Results:
    return read_results(sweep, [(cell.order, cell.method, cell.seed) for cell in grid.cells])
