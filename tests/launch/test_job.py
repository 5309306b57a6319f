"""The batch script alone, with scripts in place of Slurm's commands; tests/slurm has a real Slurm."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cl_dist.launch.slurm import SlurmJob

PYTHON = "echo 20000"
"""In place of the interpreter, which searches for a port."""
SAVES = 'sleep 0.1; echo \'  "status": "interrupted",\' >m; mv m manifest.json'
ASKS = "trap '' USR1; kill -USR1 $PPID; sleep 0.3"
PATIENT, HASTY = "attempts=16 pause=15\n", "attempts=3 pause=0.05\n"


class Commands:
    """Runs a job's script in `folder`, which is also its run folder; each command appends its call to `calls`.

    `srun` and so on: bash code to run in place of that command; `$n` is the number of earlier calls.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "bin").mkdir()
        self.set(python=PYTHON, srun="exit 75", squeue="echo RUNNING None", scontrol="")

    def set(self, **commands: str) -> None:
        for name, text in commands.items():
            path = self.folder / "bin" / name
            path.write_text(f'#!/bin/bash\nn=$(grep -c "^{name} " calls)\necho "{name} $*" >>calls\n{text}\n')
            path.chmod(0o755)

    def start(self, change: Callable[[str], str] = str, **values: Any) -> subprocess.Popen[str]:
        """Start the script; `values` are fields of the job or, in capitals, environment variables."""
        (self.folder / "calls").touch()
        environment = {name: values.pop(name) for name in list(values) if name.isupper()}
        place = {"run_folder": str(self.folder), "working_folder": str(self.folder)}
        job = SlurmJob(
            name="j", python=str(self.folder / "bin" / "python"), **{"arguments": ("run",), **place, **values}
        )
        script = job.script()
        assert PATIENT in script
        path = self.folder / "job.sh"
        path.write_text(change(script.replace(PATIENT, HASTY)))
        slurm = {"SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "n1", "SLURM_CPUS_ON_NODE": "2"}
        return subprocess.Popen(
            ["bash", path],
            env={**slurm, "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}", **environment},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=self.folder,
        )  # fmt: skip

    def run(self, change: Callable[[str], str] = str, **values: Any) -> tuple[int, str]:
        """The exit code, and the output after the first line."""
        process = self.start(change, **values)
        output = process.communicate(timeout=30)[0]
        return process.returncode, output.partition("\n")[2]

    def calls(self, name: str) -> list[str]:
        lines = (self.folder / "calls").read_text().splitlines()
        return [line for line in lines if line.split()[0] == name]

    def wait_for_call(self, name: str) -> None:
        deadline = time.monotonic() + 20
        while not self.calls(name):
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.fixture
def commands(tmp_path: Path) -> Commands:
    return Commands(tmp_path)


SAVED = "cl-dist: stopped with its state saved; restart 1 of at most 20 follows\n"
UNSAVED = "cl-dist: asked to stop, and ended before it could save (exit code 138); restart 1 of at most 20 follows\n"


def test_a_stopped_job_is_requeued_once(commands: Commands) -> None:
    assert commands.run() == (0, SAVED)
    assert commands.calls("scontrol") == ["scontrol requeue 17"]


@pytest.mark.parametrize("code", [0, 1, 2, 130])
def test_a_job_that_ended_is_not_requeued(commands: Commands, code: int) -> None:
    commands.set(srun=f"exit {code}")
    assert commands.run() == (code, "")
    assert commands.calls("squeue") == commands.calls("scontrol") == []


@pytest.mark.parametrize("state", ["CANCELLED None", "PENDING BeginTime", "COMPLETING None", ""])
def test_a_job_that_slurm_is_already_ending_is_not_requeued(commands: Commands, state: str) -> None:
    commands.set(squeue=f"echo {state}")
    assert commands.run() == (75, "")
    assert commands.calls("scontrol") == []


class TestAFreshRun:
    """A fresh run in the folder of an old run."""

    PUT_ASIDE = "mkdir -p old; mv .fresh-for-job-* manifest.json log.jsonl old 2>/dev/null"

    def asked_for(self, commands: Commands) -> list[str]:
        """The arguments of `cl-dist` at each start."""
        return [call.rpartition("cl_dist.cli:program ")[2] for call in commands.calls("srun")]

    def test_is_requested_only_at_the_first_start(self, commands: Commands) -> None:
        (commands.folder / "manifest.json").touch()
        commands.set(srun=f"{self.PUT_ASIDE}; exit 75")
        assert commands.run(fresh=True) == (0, SAVED)
        commands.set(srun="touch manifest.json; exit 75")
        commands.run(fresh=True, SLURM_RESTART_COUNT="1")
        commands.run(fresh=True, SLURM_RESTART_COUNT="2")
        assert self.asked_for(commands) == ["run --fresh", "run", "run --resume"]

    def test_without_an_old_run(self, commands: Commands) -> None:
        commands.set(srun="touch manifest.json; exit 75")
        assert commands.run(fresh=True) == (0, SAVED)
        commands.run(fresh=True, SLURM_RESTART_COUNT="1")
        assert self.asked_for(commands) == ["run --fresh", "run --resume"]

    @pytest.mark.parametrize("requeued_by", ["itself", "Slurm"])
    def test_never_resumes_the_old_run(self, commands: Commands, requeued_by: str) -> None:
        """The first start ends before the old run is moved aside."""
        (commands.folder / "manifest.json").touch()
        commands.set(srun=f"{ASKS}; exit 138")
        if requeued_by == "Slurm":
            commands.set(squeue="echo PENDING BeginTime")
        assert commands.run(fresh=True)[0] == (0 if requeued_by == "itself" else 138)
        commands.set(srun=f"{self.PUT_ASIDE}; exit 75", squeue="echo RUNNING None")
        assert commands.run(fresh=True, SLURM_RESTART_COUNT="1")[0] == 0
        commands.set(srun="touch manifest.json; exit 75")
        commands.run(fresh=True, SLURM_RESTART_COUNT="2")
        commands.run(fresh=True, SLURM_RESTART_COUNT="3")
        assert self.asked_for(commands) == ["run --fresh", "run --fresh", "run", "run --resume"]

    def test_counts_only_its_own_saves(self, commands: Commands) -> None:
        """The old run has more saves."""
        (commands.folder / "manifest.json").touch()
        (commands.folder / "log.jsonl").write_text('{"event": "saved", "task": "a"}\n' * 5)
        commands.set(srun=f"{self.PUT_ASIDE}; {SAVED_EVENT}; exit 76")
        lost = "cl-dist: lost a rank (exit code 76), and had saved its state since it started"
        assert commands.run(fresh=True) == (0, f"{lost}; restart 1 of at most 20 follows\n")

    def test_does_not_count_the_old_runs_saves(self, commands: Commands) -> None:
        (commands.folder / "manifest.json").touch()
        (commands.folder / "log.jsonl").write_text('{"event": "saved", "task": "a"}\n' * 5)
        commands.set(srun="exit 76")
        assert commands.run(fresh=True) == (76, f"cl-dist: error: lost a rank (exit code 76), {NOTHING}")


class TestAControllerThatDoesNotAnswer:
    def test_is_asked_again(self, commands: Commands) -> None:
        commands.set(squeue="((n < 2)) && exit 1; echo RUNNING None", scontrol="((n < 2)) && exit 1; exit 0")
        assert commands.run() == (0, SAVED)
        assert (len(commands.calls("squeue")), len(commands.calls("scontrol"))) == (3, 3)

    def test_is_asked_to_requeue_anyway(self, commands: Commands) -> None:
        commands.set(squeue="exit 1")
        assert commands.run() == (0, SAVED)
        assert len(commands.calls("scontrol")) == 1

    def test_is_quoted_in_the_end(self, commands: Commands) -> None:
        commands.set(scontrol="echo slurm_requeue error: Unable to contact slurm controller >&2; exit 1")
        code, said = commands.run()
        assert code == 75
        assert said == SAVED + (
            "cl-dist: error: Slurm does not requeue this job: slurm_requeue error: Unable to contact slurm "
            "controller; submit the run again with --resume\n"
        )
        assert len(commands.calls("scontrol")) == 3

    def test_is_not_asked_again_after_a_refusal(self, commands: Commands) -> None:
        commands.set(scontrol="echo Requested operation is presently disabled >&2; exit 1")
        assert commands.run()[0] == 75
        assert len(commands.calls("scontrol")) == 1


class TestASignal:
    def test_during_the_search_for_a_port(self, commands: Commands) -> None:
        commands.set(python="kill -USR1 $PPID; sleep 0.2; echo 20000")
        assert commands.run() == (0, UNSAVED)
        assert commands.calls("srun") == []

    def test_that_ends_the_search_for_a_port(self, commands: Commands) -> None:
        commands.set(python="kill -TERM $PPID; exit 143", squeue="echo CANCELLED None")
        assert commands.run() == (138, "")

    def test_before_the_process_id_of_srun_is_known(self, commands: Commands) -> None:
        commands.set(srun="trap 'touch heard; exit 75' USR1; touch listening; for _ in {1..100}; do sleep 0.1; done")
        early = "until [[ -e listening ]]; do sleep 0.01; done; kill -USR1 $$\n    ranks=$!\n"
        assert commands.run(lambda script: script.replace("    ranks=$!\n", early)) == (0, SAVED)
        assert (commands.folder / "heard").exists()

    def test_while_the_ranks_work(self, commands: Commands) -> None:
        commands.set(srun="trap 'exit 75' USR1; touch listening; for _ in {1..100}; do sleep 0.1; done")
        process = commands.start()
        while not (commands.folder / "listening").exists():
            time.sleep(0.01)
        process.send_signal(10)
        assert process.communicate(timeout=30)[0].endswith(SAVED)


SAVED_EVENT = """echo '{"event": "saved", "task": "a"}' >>log.jsonl"""
NOTHING = "and not restarted: nothing was saved since it started; submit the run again with --resume\n"


@pytest.mark.parametrize("code", [76, 134, 137, 143])
class TestALostRank:
    def test_restarts_a_run_that_made_progress(self, commands: Commands, code: int) -> None:
        commands.set(srun=f"{SAVED_EVENT}; exit {code}")
        lost = f"cl-dist: lost a rank (exit code {code}), and had saved its state since it started"
        assert commands.run() == (0, f"{lost}; restart 1 of at most 20 follows\n")

    def test_does_not_restart_a_run_without_progress(self, commands: Commands, code: int) -> None:
        (commands.folder / "log.jsonl").write_text('{"event": "saved", "task": "a"}\n')
        commands.set(srun=f"""echo '{{"event": "step"}}' >>log.jsonl; exit {code}""")
        assert commands.run() == (code, f"cl-dist: error: lost a rank (exit code {code}), {NOTHING}")
        assert commands.calls("scontrol") == []

    def test_restarts_are_limited(self, commands: Commands, code: int) -> None:
        commands.set(srun=f"{SAVED_EVENT}; exit {code}")
        ended, said = commands.run(max_restarts=3, SLURM_RESTART_COUNT="3")
        assert ended == code
        assert "not restarted: --max-restarts is 3" in said


def test_an_error_is_not_a_lost_rank(commands: Commands) -> None:
    commands.set(srun=f"{SAVED_EVENT}; exit 1")
    assert commands.run() == (1, "")


class TestRanksThatTakeTooLongToEnd:
    def test_have_saved_if_the_manifest_says_so(self, commands: Commands) -> None:
        commands.set(srun=f"{SAVES}; exit 137")
        assert commands.run() == (0, SAVED)

    def test_may_be_asked_just_as_they_end(self, commands: Commands) -> None:
        commands.set(srun="kill -USR1 $PPID; exit 137")  # whose exit code bash may lose
        code, said = commands.run()
        assert (code, said.partition(" (")[0]) == (0, UNSAVED.partition(" (")[0])

    @pytest.mark.parametrize(("ending", "code"), [("exit 1", 1), (f"{ASKS}; exit 138", 138)])
    def test_have_not_saved_if_the_manifest_is_of_an_earlier_start(
        self, commands: Commands, ending: str, code: int
    ) -> None:
        (commands.folder / "manifest.json").write_text('"status": "interrupted"')
        commands.set(srun=ending)
        assert commands.run() == ((0, UNSAVED) if code == 138 else (code, ""))

    def test_have_not_saved_if_the_manifest_says_otherwise(self, commands: Commands) -> None:
        commands.set(srun='echo \'"status": "failed"\' >m; mv m manifest.json; exit 1')
        assert commands.run() == (1, "")

    def test_are_not_reported_as_saved_without_a_restart(self, commands: Commands) -> None:
        commands.set(srun=f"{ASKS}; exit 137")
        code, said = commands.run(max_restarts=0)
        assert code == 137
        assert said.startswith("cl-dist: error: asked to stop, and ended before it could save (exit code 137), and not")


@pytest.mark.parametrize(
    ("cpus", "ranks", "expected"), [("72(x2),36", 4, 9), ("8", 4, 2), ("36,72(x2)", 1, 36), ("1", 2, 1), (None, 2, 1)]
)
def test_cpus_are_those_of_the_smallest_node(commands: Commands, cpus: str | None, ranks: int, expected: int) -> None:
    slurm = {} if cpus is None else {"SLURM_JOB_CPUS_PER_NODE": cpus}
    commands.run(ranks_per_node=ranks, **slurm)
    assert f"--cpus-per-task={expected} " in commands.calls("srun")[0]
