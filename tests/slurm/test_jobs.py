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
from itertools import count
from pathlib import Path

import psutil
import pytest
import torch
from cl_dist.launch.scheduler import JobState, job_state
from safetensors.torch import load_file

from tests.ranks import REPOSITORY
from tests.recipes import write_recipe
from tests.slurm.cluster import Cluster, missing, running_cluster
from tests.zygote import Zygote

REASON = missing()
pytestmark = pytest.mark.skipif(REASON is not None, reason=REASON or "")

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
                if ours and "cl_dist" in process.cmdline():
                    found.append(process)
        return found

    def steps(self) -> int:
        log = self.run / "log.jsonl"
        return log.read_text().count('"step"') if log.exists() else 0

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
def runs(cluster: Cluster, tmp_path: Path) -> Callable[[], Run]:
    """Makes runs that are ready to be submitted."""
    numbers = count(1)

    def make() -> Run:
        folder = tmp_path / f"it's $(mine), 50% 'ü' {next(numbers)}"  # no path may mislead Slurm or bash
        folder.mkdir()
        return Run(cluster, folder, long_recipe(folder))

    return make


@pytest.fixture
def a_run(runs: Callable[[], Run]) -> Run:
    return runs()


def long_recipe(folder: Path) -> Path:
    """Two times 64 steps."""
    return write_recipe(folder, train={"epochs": 16}, method={"name": "sequential"})


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


def test_two_jobs_on_the_same_nodes_end_and_the_one_with_a_time_limit_requeues_itself(
    runs: Callable[[], Run], undisturbed: dict[str, torch.Tensor]
) -> None:
    limited, plain = runs(), runs()
    limited.submit("--nodes", "2", "--time", "1", "--warn-seconds", "0")
    limited.wait_for(lambda: limited.steps() >= 3 or limited.state.restarts, "steps of the run")
    ranks = limited.ranks()
    for process in ranks:  # a long step, which takes no computing from the other job
        process.send_signal(signal.SIGSTOP)
    submit_and_look_on(plain)
    limited.wait_for(lambda: limited.state.run_time > "00:00:45" or limited.state.restarts, "time that passes")
    for process in ranks:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGCONT)
    check_ending(plain, undisturbed)
    limited.wait_for_end()
    assert limited.state.restarts >= 1
    assert "the job's time is nearly over" in limited.log()
    assert "restart 1 of at most 20 follows" in limited.log()
    assert_weights(limited.run, undisturbed)


def submit_and_look_on(run: Run) -> None:
    """Submit a run of two nodes with a GPU each, try to submit it again, and look at its ranks."""
    run.submit("--nodes", "2", "--gpus-per-node", "1", "--time", "30")
    second = run.command("slurm", str(run.recipe), "--nodes", "2", "--submit")
    assert second.returncode == 2
    assert f"job {run.job} of {run.run} is " in second.stderr
    run.wait_for_steps(1)
    ranks = sorted((process.environ() for process in run.ranks()), key=lambda variables: variables["SLURM_PROCID"])
    assert [variables["SLURMD_NODENAME"] for variables in ranks] == ["node1", "node2"]
    assert [variables["CUDA_VISIBLE_DEVICES"] for variables in ranks] == ["0", "0"]
    assert run.status()[0] == "status      running"


def check_ending(run: Run, expected: dict[str, torch.Tensor]) -> None:
    """Wait for the end and check results, status and what lies in the run folder."""
    run.wait_for_end()
    assert_weights(run.run, expected)
    lines = run.status()
    assert lines[0] == "status      finished"
    assert any(line.startswith(f"job         {run.job} COMPLETED") for line in lines)
    assert {path.name for path in (run.run / "slurm" / "01").iterdir()} == {
        "job.sh", "job.json", "recipe.yaml", f"slurm-{run.job}.log"
    }  # fmt: skip
    assert f"job {run.job} on node[1-2], restart 0 of at most 20" in run.log()


def test_requeued_and_signalled_it_goes_on(a_run: Run, undisturbed: dict[str, torch.Tensor]) -> None:
    a_run.submit("--nodes", "2")
    a_run.wait_for_steps(3)
    a_run.cluster.ask("scontrol", "requeue", a_run.job)  # what preemption does
    a_run.wait_for(lambda: a_run.state.restarts == 1, "restart")
    a_run.wait_for_steps(3)
    assert "            restarted 1 times, at most 20" in a_run.status()
    a_run.cluster.ask("scancel", "--signal=USR1", "--batch", a_run.job)
    a_run.wait_for(lambda: a_run.state.restarts == 2, "restart")
    a_run.wait_for_end()
    assert a_run.log().count("stopped after step") >= 2
    assert json.loads((a_run.run / "manifest.json").read_text())["restarts"] == 2
    assert_weights(a_run.run, undisturbed)


def test_without_a_node_that_died_it_goes_on_alone(a_run: Run, undisturbed: dict[str, torch.Tensor]) -> None:
    a_run.submit("--nodes", "2")
    a_run.wait_for_steps(3)
    a_run.cluster.kill_node("node2")
    a_run.wait_for(lambda: a_run.state.state == "PENDING", "requeue")
    assert a_run.state.restarts == 1
    assert a_run.status()[0] == "status      killed; --resume goes on"
    a_run.cluster.ask("scancel", a_run.job)
    a_run.wait_for_end("CANCELLED")
    a_run.submit("--nodes", "1", "--ranks-per-node", "2", "--resume")
    a_run.wait_for_end()
    assert_weights(a_run.run, undisturbed)
