"""`cl-dist slurm`: runs a recipe as a Slurm job; also the job's lines in `cl-dist status`."""

from __future__ import annotations

import dataclasses
import os
import shlex
import sys
import time
from argparse import ArgumentParser, Namespace, _ArgumentGroup
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cl_dist import __version__
from cl_dist.cli.run import check_stream_and_model
from cl_dist.config.load import dump_recipe, load_recipe
from cl_dist.config.schema import Recipe
from cl_dist.errors import BadInput
from cl_dist.launch.scheduler import JobState, job_state, require_sbatch, submit
from cl_dist.launch.slurm import DEFAULT_RESTARTS, LOG, SlurmJob, captured_environment, job_name, quote
from cl_dist.machine import DeviceSetting
from cl_dist.state.atomic import make_folder, write_json, write_text
from cl_dist.state.preflight import preflight, put_back, set_aside
from cl_dist.state.run_folder import RunFolder, SlurmRecord
from cl_dist.tasks.orders import resolve_order


def add_commands(commands: Any, common: ArgumentParser, changes: ArgumentParser) -> None:
    """Add `slurm`; `commands` is argparse's collection of subparsers."""
    parser = commands.add_parser(
        "slurm",
        parents=[changes, common],
        description="Check a recipe, then print or submit its batch script. docs/slurm.md explains the script.",
    )
    parser.add_argument("recipe", metavar="RECIPE", help="name of a shipped recipe, or a YAML file")
    add_job_options(parser)
    parser.add_argument("--resume", action="store_true", help="continue the run in output_dir")
    parser.add_argument("--fresh", action="store_true", help="move the run in output_dir aside and start a new one")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--print", action="store_true", help="print the script and change nothing (default)")
    what.add_argument("--submit", action="store_true", help="save script and recipe in the run folder, and submit")
    parser.set_defaults(command=slurm, works=lambda parsed: parsed.submit)


def add_job_options(parser: ArgumentParser | _ArgumentGroup) -> None:
    """Add the job's requests to Slurm: the options that `make_job` reads."""
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="number of nodes (default: 1)")
    parser.add_argument(
        "--gpus-per-node",
        default="0",
        metavar="[TYPE:]G",
        help="GPUs per node, such as 4 or a100:4 (default: 0, which runs the ranks on CPUs)",
    )
    parser.add_argument("--ranks-per-node", type=int, metavar="R", help="ranks per node (default: one per GPU, or 1)")
    parser.add_argument("--cpus-per-rank", type=int, metavar="C", help="CPUs per rank (default: Slurm's)")
    parser.add_argument(
        "--time", metavar="T", help="time limit, such as 90, 4:00:00 or 2-12 (default: the partition's)"
    )
    parser.add_argument("--partition", metavar="P", help="partition (default: the cluster's)")
    parser.add_argument("--job-name", metavar="NAME", help="job name (default: the recipe's name)")
    parser.add_argument("--interface", metavar="IF", help="network interface for NCCL and Gloo, such as ib0")
    parser.add_argument(
        "--max-restarts",
        type=int,
        default=DEFAULT_RESTARTS,
        metavar="N",
        help=f"maximum number of restarts (default: {DEFAULT_RESTARTS})",
    )
    parser.add_argument(
        "--warn-seconds",
        type=int,
        metavar="S",
        help="seconds before the time limit at which Slurm asks the job to stop (default: 120, or a quarter of a short "
        "job)",
    )
    parser.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="OPTION",
        dest="options",
        help="another sbatch option, such as account=physics or exclusive (may be repeated)",
    )


def slurm(arguments: Namespace) -> int:
    """Run the checks of `cl-dist run`, then print or submit the batch script."""
    if arguments.submit:
        require_sbatch()
    recipe, recipe_dir = load_recipe(arguments.recipe, arguments.changes)
    recipe = resolve_order(recipe, recipe_dir)
    job = make_job(arguments, recipe)
    # The job's layout, not the recipe, determines the number of ranks and their device.
    launch = replace(recipe.launch, processes=job.ranks, device=job.device)
    recipe = replace(recipe, launch=launch, output_dir=job.run_folder)
    check_stream_and_model(recipe, recipe_dir)
    if not arguments.submit:
        if arguments.fresh and arguments.resume:
            raise BadInput("--resume and --fresh exclude each other: continue the old run, or move it aside")
        print(_script(job, arguments), end="")
        return 0
    # Everything that can fail comes before the old run is moved aside, except for Slurm's answer.
    folder = RunFolder(Path(recipe.output_dir))
    _refuse_second_job(folder)
    preflight(folder.path, recipe, resume=arguments.resume, fresh=arguments.fresh, world_size=job.ranks)
    aside = set_aside(folder.path) if arguments.fresh else None
    try:
        _submit(job, recipe, folder, arguments)
    except BadInput:  # Slurm rejected the job
        if aside is not None:
            put_back(aside, folder.path)
        raise
    return 0


def make_job(arguments: Namespace, recipe: Recipe) -> SlurmJob:
    """The job that the options describe, running the recipe under the name on the command line."""
    taken = {field.name for field in dataclasses.fields(SlurmJob)} & set(vars(arguments))
    asked = {name: getattr(arguments, name) for name in taken}
    name = job_name(Path(arguments.recipe).stem) if arguments.job_name is None else arguments.job_name
    job = SlurmJob(
        **asked,
        name=name,
        run_folder=os.path.abspath(recipe.output_dir),
        working_folder=os.getcwd(),
        python=sys.executable,
        arguments=(),
        environment=captured_environment(os.environ, sys.executable),
    )
    _check_device(recipe.launch.device, job)
    # Only now is the number of ranks known, which the command line needs.
    changes = [*arguments.changes, f"launch.processes={job.ranks}", f"launch.device={job.device}"]
    return replace(job, arguments=("run", arguments.recipe, *(word for text in changes for word in ("--set", text))))


def _check_device(setting: DeviceSetting, job: SlurmJob) -> None:
    """Raise BadInput if the recipe asks for another device than the job; `auto` is what the job has."""
    if setting == "cuda" and not job.gpus:
        raise BadInput(
            "launch.device: cuda, but the job asks Slurm for no GPUs; give --gpus-per-node, or --set launch.device=cpu"
        )
    if setting == "cpu" and job.gpus:
        raise BadInput(
            f"--gpus-per-node: {job.gpus_per_node}, but launch.device is cpu; leave --gpus-per-node out, or --set "
            "launch.device=cuda"
        )


def _script(job: SlurmJob, arguments: Namespace) -> str:
    """The batch script, with the command that created it in its second line."""
    head, _, rest = job.script().partition("\n")
    made_by = " ".join(map(quote, ["cl-dist", *arguments.argv]))
    return f"{head}\n# cl_dist {__version__}: {made_by}\n{rest}"


def _submit(job: SlurmJob, recipe: Recipe, folder: RunFolder, arguments: Namespace) -> None:
    """Save script and resolved recipe, so that later edits to the recipe change nothing, and submit the job."""
    record = folder.new_slurm_record()
    make_folder(record.path)
    write_text(record.recipe, dump_recipe(recipe))
    script = _script(replace(job, arguments=("run", str(record.recipe)), fresh=False), arguments)
    write_text(record.script, script)
    number = submit(record.script, os.environ)
    write_json(
        record.job,
        {"job": number, "submitted": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "max_restarts": job.max_restarts},
    )
    print(f"submitted  job {number}: {_layout(job)}")
    print(f"script     {record.script}")
    print(f"log        {record.path / LOG.replace('%j', number)}")
    print(f"follow it  cl-dist status {shlex.quote(job.run_folder)}")


def _layout(job: SlurmJob) -> str:
    kind = "on a GPU each" if job.gpus else "on CPUs"
    ranks = f"{job.ranks_on_node} rank{'s' * (job.ranks_on_node > 1)}"
    return f"{ranks} {kind}" if job.nodes == 1 else f"{job.nodes} nodes, {ranks} on each, {kind}"


def _refuse_second_job(folder: RunFolder) -> None:
    """Raise BadInput if the run has a job already: the second job would fail, hours later, because of the first."""
    job = newest_job(folder)
    if job is not None and job.state is not None and job.state.is_alive:
        raise BadInput(
            f"job {job.number} of {folder.path} is already {job.state.state}: wait for it, or cancel it with "
            f"scancel {job.number}"
        )


@dataclass(frozen=True)
class SubmittedJob:
    """The latest job of a run."""

    number: str
    max_restarts: int
    record: SlurmRecord
    state: JobState | None
    """None if Slurm no longer knows the job, or is not installed here."""


def newest_job(folder: RunFolder) -> SubmittedJob | None:
    """The last job that was submitted for a run, with its state; None if there is none."""
    record = folder.newest_slurm_record()
    if record is None:
        return None
    job = record.read_job()
    return SubmittedJob(job["job"], job["max_restarts"], record, job_state(job["job"]))


def status_lines(job: SubmittedJob) -> Iterator[str]:
    """The lines about a run's job in `cl-dist status`."""
    state = job.state
    if state is None:
        yield f"job         {job.number}; Slurm does not answer, or no longer knows it"
    else:
        reason = f" ({state.reason})" if state.reason not in ("None", "") else ""
        where = f" on {state.nodes}, for {state.run_time} of {state.time_limit}" if state.nodes else ""
        yield f"job         {job.number} {state.state}{reason}{where}"
        yield f"            restarts: {state.restarts} of at most {job.max_restarts}"
    yield f"log         {job.record.path / LOG.replace('%j', job.number)}"
