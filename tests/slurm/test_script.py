"""The batch script on a real cluster, with ranks that do as those of a run do towards Slurm, but do not train."""

from __future__ import annotations

import json
import os
import shlex
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cl_dist.errors import BadInput
from cl_dist.launch.child import BOOTSTRAP, PROGRAM
from cl_dist.launch.scheduler import JobState, TimeLeft, job_state, submit
from cl_dist.launch.slurm import SlurmJob
from tests import mpi
from tests.launch.test_mpi import ASK
from tests.launch.test_slurm import NASTY
from tests.ranks import REPOSITORY
from tests.slurm.cluster import PATIENCE_SECONDS, Cluster, missing, running_cluster

REASON = missing()
pytestmark = pytest.mark.skipif(REASON is not None, reason=REASON or "")

RANK = """\
#!{python}
# Called as Python is by the script; notes how it was started and behaves as the second argument says.
import json, os, runpy, signal, sys, time
sys.path.insert(0, {repository!r})
if sys.argv[3] != "cl_dist.cli:program":
    sys.argv[1:] = []
    runpy.run_module("cl_dist.launch.rendezvous", run_name="__main__")
    sys.exit()
behaviour, rank, asked = sys.argv[5], os.environ["SLURM_PROCID"], []
restart = os.environ.get("SLURM_RESTART_COUNT", "0")
if behaviour != "deaf":
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: asked.append(number))
with open("start-%s-%s.json.part" % (restart, rank), "w") as file:
    json.dump({{"arguments": sys.argv[1:], "environment": dict(os.environ)}}, file)
os.rename(file.name, file.name[:-5])
if "--resume" in sys.argv or behaviour == "end":
    sys.exit(0)
if behaviour == "fail" and rank == "1":
    sys.exit(3)
while not asked:
    time.sleep(0.02)
if behaviour == "fail":  # a run that is stopped outside of training
    sys.exit(128 + asked[0])
time.sleep(0.2)
if rank == "0":
    open("manifest.json", "w").close()
time.sleep(0.2)
os._exit(75)  # the other rank's end makes Slurm send SIGTERM, which would kill Python while it finishes
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with running_cluster(nodes=2) as cluster:
        yield cluster


class Job:
    """A job of two ranks on two nodes that has been submitted."""

    def __init__(self, cluster: Cluster, folder: Path, behaviour: str, *words: str, **changes: Any) -> None:
        self.cluster, self.folder = cluster, folder / "it's $(mine)"
        self.folder.mkdir()
        program = self.folder / "python"
        program.write_text(RANK.format(python=sys.executable, repository=str(REPOSITORY)))
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        values = {"name": "job", "nodes": 2, "arguments": ("run", behaviour, *words), **changes}
        place = {"run_folder": str(self.folder), "working_folder": str(self.folder), "python": str(program)}
        script = self.folder / "job.sh"
        script.write_bytes(os.fsencode(SlurmJob(**place, **values).script()))
        self.number = submit(script, os.environ)

    @property
    def state(self) -> JobState:
        state = job_state(self.number)
        assert state is not None
        return state

    def started(self, restart: int = 0) -> list[dict[str, Any]]:
        """What each rank noted when it was started, once both have."""
        files = [self.folder / f"start-{restart}-{rank}.json" for rank in range(2)]
        self.wait_for(lambda: all(file.exists() for file in files), "ranks that are started")
        return [json.loads(file.read_text()) for file in files]

    def wait_for(self, condition: object, what: str, patience: float = PATIENCE_SECONDS) -> None:
        try:
            self.cluster.wait_for(condition, what, patience)
        except TimeoutError as error:
            raise AssertionError(f"{error}; {self.state}\n{self.log()}") from error

    def ends_as(self, state: str, restarts: int = 0) -> None:
        self.wait_for(lambda: not self.state.is_alive, "end of the job")
        assert (self.state.state, self.state.restarts) == (state, restarts), self.log()

    def log(self) -> str:
        return "".join(path.read_text() for path in self.folder.glob("slurm-*.log"))


def test_every_rank_gets_its_arguments_and_its_environment(cluster: Cluster, tmp_path: Path) -> None:
    environment = {"HF_HOME": "a b"}
    job = Job(
        cluster, tmp_path, "end", *NASTY,
        cpus_per_rank=2, gpus_per_node=1, environment=environment, options=["export=NONE"],
    )  # fmt: skip
    ranks = job.started()
    for number, rank in enumerate(ranks):
        assert rank["arguments"] == ["-c", BOOTSTRAP, PROGRAM, "run", "end", *NASTY]
        variables = rank["environment"]
        assert "PYTEST_CURRENT_TEST" not in variables
        assert (variables["SLURM_PROCID"], variables["SLURM_NTASKS"]) == (str(number), "2")
        assert (variables["OMP_NUM_THREADS"], variables["CUDA_VISIBLE_DEVICES"]) == ("2", "0")
        assert variables["HF_HOME"] == "a b"
    assert len({rank["environment"]["MASTER_PORT"] for rank in ranks}) == 1
    job.ends_as("COMPLETED")
    assert f"cl-dist: job {job.number} on node[1-2], restart 0 of at most 20" in job.log()


def test_requeued_from_outside_it_resumes(cluster: Cluster, tmp_path: Path) -> None:
    job = Job(cluster, tmp_path, "train")
    assert "--resume" not in job.started()[0]["arguments"]
    cluster.ask("scontrol", "requeue", job.number)
    assert job.started(restart=1)[1]["arguments"][-1] == "--resume"
    job.ends_as("COMPLETED", restarts=1)


def test_signalled_it_requeues_itself_as_often_as_it_may(cluster: Cluster, tmp_path: Path) -> None:
    job = Job(cluster, tmp_path, "train", max_restarts=1)
    job.started()
    cluster.ask("scancel", "--signal=USR1", "--batch", job.number)
    job.started(restart=1)
    assert "stopped with its state saved; restart 1 of at most 1 follows" in job.log()
    job.ends_as("COMPLETED", restarts=1)
    (tmp_path / "again").mkdir()
    last = Job(cluster, tmp_path / "again", "train", max_restarts=0)
    last.started()
    cluster.ask("scancel", "--signal=USR1", last.number)  # to the ranks, past the script
    last.ends_as("FAILED")
    assert "stopped with its state saved, and not restarted: --max-restarts is 0" in last.log()


def test_signalled_before_it_listens_it_is_started_again(cluster: Cluster, tmp_path: Path) -> None:
    job = Job(cluster, tmp_path, "deaf", max_restarts=1)
    job.started()
    (job.folder / "manifest.json").touch()
    cluster.ask("scancel", "--signal=USR1", "--batch", job.number)
    job.ends_as("COMPLETED", restarts=1)


def test_a_rank_that_fails_ends_the_job_for_good(cluster: Cluster, tmp_path: Path) -> None:
    job = Job(cluster, tmp_path, "fail")
    job.ends_as("FAILED")
    assert "node2: task 1: Exited with exit code 3" in job.log()


def test_cancelled_it_is_not_started_again(cluster: Cluster, tmp_path: Path) -> None:
    job = Job(cluster, tmp_path, "train")
    job.started()
    cluster.ask("scancel", job.number)
    job.ends_as("CANCELLED")
    assert (job.folder / "manifest.json").exists()


def test_the_time_left_is_slurms(cluster: Cluster, tmp_path: Path) -> None:
    job = Job(cluster, tmp_path, "train", time="5")
    job.started()
    left = TimeLeft({"SLURM_JOB_ID": job.number})
    answer = left()
    assert answer is not None
    assert 200 < answer <= 300
    cluster.ask("scancel", job.number)
    job.ends_as("CANCELLED")


def test_what_slurm_refuses_is_told_in_its_words(cluster: Cluster, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"^Slurm rejects the job: invalid partition specified: nowhere$"):
        Job(cluster, tmp_path, "end", partition="nowhere")


def test_mpi_tells_where_ranks_on_two_nodes_meet(cluster: Cluster, tmp_path: Path) -> None:
    reason = mpi.missing()
    if reason is not None:
        pytest.skip(reason)
    (tmp_path / "ask.py").write_text(ASK)
    command = shlex.join([*mpi.MPIRUN, "-np", "2", "--map-by", "node", sys.executable, "ask.py"])
    done = subprocess.run(
        ["sbatch", "--nodes=2", "--ntasks-per-node=1", "--wait", "--output=log", f"--wrap={command}"],
        cwd=tmp_path, env={**cluster.environment, "PYTHONPATH": str(REPOSITORY)}, capture_output=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, (tmp_path / "log").read_text()
    found = [json.loads((tmp_path / f"answer-{rank}.json").read_text()) for rank in range(2)]
    assert [(answer["rank"], answer["local_rank"]) for answer in found] == [(0, 0), (1, 0)]
    assert {answer["to"] for answer in found} == {f"{cluster.network}.1"}
    assert len({answer["port"] for answer in found}) == 1


@pytest.mark.slow
def test_warned_and_even_past_its_time_limit_it_requeues_itself(cluster: Cluster, tmp_path: Path) -> None:
    for name in ("warned", "late"):
        (tmp_path / name).mkdir()
    warned = Job(cluster, tmp_path / "warned", "train", time="2", warn_seconds=60)
    late = Job(cluster, tmp_path / "late", "train", time="1", warn_seconds=0)
    for job in (warned, late):
        job.started()
        job.wait_for(lambda job=job: job.state.restarts == 1, "restart", patience=150.0)
        job.ends_as("COMPLETED", restarts=1)
    assert "DUE TO TIME LIMIT" not in warned.log()
    assert "DUE TO TIME LIMIT" in late.log()
