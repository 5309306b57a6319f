"""`cl-dist slurm --submit` on a real cluster: it trains over two nodes, and whatever interrupts it, it ends with the
weights of an undisturbed run.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from cl_dist.launch.child import PROGRAM
from cl_dist.launch.scheduler import JobState, job_state
from tests.ranks import REPOSITORY
from tests.recipes import write_recipe
from tests.slurm.cluster import Cluster, missing, running_cluster
from tests.zygote import Zygote

REASON = missing()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(REASON is not None, reason=REASON or "")]

PATIENCE_SECONDS = 240.0
"""A start alone may take a minute where other tests keep the cores busy."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with running_cluster(nodes=2) as cluster:
        yield cluster


@dataclass
class Run:
    """A run that is submitted as a job."""

    cluster: Cluster
    folder: Path
    recipe: Path
    job: str = ""

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """`cl-dist ARGUMENTS`, as a user calls it."""
        environment = {**self.cluster.environment, "PYTHONPATH": str(REPOSITORY)}
        return subprocess.run(
            [sys.executable, "-m", "cl_dist", *arguments],
            cwd=self.folder, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip

    def submit(self, *options: str) -> None:
        done = self.command("slurm", str(self.recipe), *options, "--submit")
        assert done.returncode == 0, done.stderr
        self.job = done.stdout.split()[2].rstrip(":")

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def state(self) -> JobState:
        state = job_state(self.job)
        assert state is not None
        return state

    def log(self) -> str:
        return "".join(path.read_text() for path in sorted(self.run.glob("slurm/*/*.log")))

    def ranks(self) -> list[psutil.Process]:
        """The processes of the job's ranks, on whatever node."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                variables = process.environ()
                ours = variables.get("SLURM_JOB_ID") == self.job and "SLURM_STEP_ID" in variables
                if ours and PROGRAM in process.cmdline():
                    found.append(process)
        return found

    def signal_ranks(self, number: int) -> None:
        for process in self.ranks():
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def events(self, name: str) -> int:
        log = self.run / "log.jsonl"
        return log.read_text().count(f'"event": "{name}"') if log.exists() else 0

    def steps(self) -> int:
        return self.events("step")

    def wait_for_steps(self, more: int) -> None:
        before = self.steps()
        self.wait_for(lambda: self.steps() >= before + more, "steps of the run")

    def wait_for_end(self, expected: str = "COMPLETED") -> None:
        self.wait_for(lambda: not self.state.is_alive, "end of the job")
        assert self.state.state == expected, self.log()

    def wait_for(self, condition: object, what: str) -> None:
        try:
            self.cluster.wait_for(condition, what, PATIENCE_SECONDS)
        except TimeoutError as error:
            raise AssertionError(f"{error}; {self.state}\n{self.log()}") from error

    def status(self) -> list[str]:
        done = self.command("status", str(self.run))
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()


@pytest.fixture
def a_run(cluster: Cluster, tmp_path: Path) -> Iterator[Run]:
    folder = tmp_path / "it's $(mine), 50% 'ü'"  # no path may mislead Slurm or bash
    folder.mkdir()
    run = Run(cluster, folder, long_recipe(folder))
    yield run
    cluster.ask("scancel", run.job)


def long_recipe(folder: Path) -> Path:
    """Two times 400 steps: many seconds, so that a job can be caught in the middle of them."""
    return write_recipe(folder, train={"epochs": 100}, method={"name": "sequential"})


@pytest.fixture(scope="module")
def undisturbed(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    folder = tmp_path_factory.mktemp("undisturbed")
    outcome = zygote.run(["run", str(long_recipe(folder))], folder, world=2)
    assert outcome.codes == [0, 0], outcome.output
    return weights(folder / "run")


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "tasks" / "02-summer" / "model" / "model.safetensors")


def assert_weights(run: Path, expected: dict[str, torch.Tensor]) -> None:
    ours = weights(run)
    assert ours.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in ours.items())


@pytest.fixture(scope="module")
def limited(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A job of two minutes in the middle of a step that takes long, but no computing from the other jobs."""
    folder = tmp_path_factory.mktemp("limited")
    run = Run(cluster, folder, long_recipe(folder))
    run.submit("--nodes", "2", "--time", "2", "--warn-seconds", "0")
    run.wait_for(lambda: run.steps() >= 3 or run.state.restarts, "steps of the run")
    run.signal_ranks(signal.SIGSTOP)
    return run


def test_beside_another_job_it_trains_over_two_nodes_to_the_end(
    limited: Run, a_run: Run, undisturbed: dict[str, torch.Tensor]
) -> None:
    a_run.submit("--nodes", "2", "--time", "30")
    second = a_run.command("slurm", str(a_run.recipe), "--nodes", "2", "--submit")
    assert second.returncode == 2
    assert f"job {a_run.job} of {a_run.run} is " in second.stderr
    a_run.wait_for_steps(1)
    ranks = sorted((process.environ() for process in a_run.ranks()), key=lambda variables: variables["SLURM_PROCID"])
    assert [variables["SLURMD_NODENAME"] for variables in ranks] == ["node1", "node2"]
    assert not any(variables.get("CUDA_VISIBLE_DEVICES") for variables in ranks)
    assert a_run.status()[0] == "status      running"
    a_run.wait_for_end()
    assert_weights(a_run.run, undisturbed)
    lines = a_run.status()
    assert lines[0] == "status      finished"
    assert any(line.startswith(f"job         {a_run.job} COMPLETED") for line in lines)
    assert {path.name for path in (a_run.run / "slurm" / "01").iterdir()} == {
        "job.sh", "job.json", "recipe.yaml", f"slurm-{a_run.job}.log"
    }  # fmt: skip
    assert f"job {a_run.job} on node[1-2], restart 0 of at most 20" in a_run.log()
    assert "2 ranks on the CPU: " in a_run.log()


def test_ranks_without_the_gpus_that_the_job_asked_for_do_not_train(
    cluster: Cluster, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The cluster's GPUs are made up."""
    folder = tmp_path_factory.mktemp("gpus")
    run = Run(cluster, folder, long_recipe(folder))
    run.submit("--nodes", "1", "--gpus-per-node", "1", "--time", "30")
    run.wait_for_end("FAILED")
    assert "cl-dist: error: launch.device: cuda: " in run.log()
    assert run.steps() == 0


def test_requeued_and_signalled_it_goes_on(a_run: Run, undisturbed: dict[str, torch.Tensor]) -> None:
    a_run.submit("--nodes", "2")
    a_run.wait_for_steps(3)
    a_run.cluster.ask("scontrol", "requeue", a_run.job)  # what preemption does
    a_run.wait_for(lambda: a_run.state.restarts == 1, "restart")
    a_run.wait_for(lambda: a_run.events("resumed") == 1, "resume")  # until then the steps are the first start's last
    a_run.wait_for_steps(3)
    a_run.cluster.ask("scancel", "--signal=USR1", "--batch", a_run.job)
    a_run.wait_for(lambda: a_run.state.restarts == 2, "restart")
    assert "            restarts: 2 of at most 20" in a_run.status()
    a_run.wait_for_end()
    assert a_run.log().count("stopped after step") >= 2
    assert json.loads((a_run.run / "manifest.json").read_text())["restarts"] == 2
    assert_weights(a_run.run, undisturbed)


def test_before_its_time_limit_it_saves_and_requeues_itself(limited: Run, undisturbed: dict[str, torch.Tensor]) -> None:
    limited.wait_for(lambda: limited.state.run_time > "00:01:42" or limited.state.restarts, "time that passes")
    limited.signal_ranks(signal.SIGCONT)
    limited.wait_for_end()
    assert limited.state.restarts >= 1
    assert "the job's time is nearly over" in limited.log()
    assert "restart 1 of at most 20 follows" in limited.log()
    assert_weights(limited.run, undisturbed)


def test_preempted_and_then_without_a_rank_it_goes_on(a_run: Run, undisturbed: dict[str, torch.Tensor]) -> None:
    """Both in one run, because the second one's end on a single node is long."""
    a_run.submit("--nodes", "2", "--partition", "main", "--set", "checkpoint.every_steps=10")
    a_run.wait_for_steps(3)
    a_run.wait_for(urgent_job(a_run.cluster), "room for a job of a higher partition")
    a_run.wait_for(lambda: a_run.events("resumed") == 1, "resume")
    assert a_run.state.restarts == 1
    assert "cl-dist: stopped with its state saved; restart 1 of at most 20 follows" in a_run.log()
    saved = a_run.events("saved")
    a_run.wait_for(lambda: a_run.events("saved") > saved, "state that is saved")
    # Slurm would notice seconds later than the other rank does.
    a_run.cluster.kill_processes("node2")
    a_run.wait_for(lambda: a_run.state.state == "PENDING", "requeue")
    assert a_run.state.restarts == 2
    assert (
        "cl-dist: error: rank 0 lost another rank, which has ended or cannot be reached, while training" in a_run.log()
    )
    assert "Traceback" not in a_run.log()
    a_run.cluster.ask("scancel", a_run.job)
    a_run.wait_for_end("CANCELLED")
    a_run.submit("--nodes", "1", "--ranks-per-node", "2", "--resume")
    a_run.cluster.restart_node("node2")
    a_run.wait_for_end()
    assert_weights(a_run.run, undisturbed)


def urgent_job(cluster: Cluster) -> Callable[[], bool]:
    """Submit a job that needs all CPUs, to the partition that preempts; returns whether it has run."""
    command = ("sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--ntasks-per-node=2", "--output=/dev/null")
    number = cluster.ask(*command, "--wrap=sleep 1").strip()
    return lambda: number in cluster.ask("squeue", "--noheader", "--states=COMPLETED", "--jobs", number, "--format=%i")


def test_without_a_node_that_died_it_goes_on_alone(a_run: Run, undisturbed: dict[str, torch.Tensor]) -> None:
    a_run.submit("--nodes", "2")
    a_run.wait_for_steps(3)
    a_run.cluster.kill_node("node2")
    a_run.wait_for(lambda: a_run.state.state == "PENDING", "requeue")
    assert a_run.state.restarts == 1
    assert a_run.status()[0] == "status      killed; continue with --resume"
    a_run.cluster.ask("scancel", a_run.job)
    a_run.wait_for_end("CANCELLED")
    a_run.submit("--nodes", "1", "--ranks-per-node", "2", "--resume")
    a_run.wait_for_end()
    assert_weights(a_run.run, undisturbed)
