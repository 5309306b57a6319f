"""Slurm's commands, as far as a run needs them: submit a job, ask how it is, and how much time is left to it."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cl_dist.errors import BadInput, ClDistError

PATIENCE_SECONDS = 30.0
"""A controller that is busy answers late."""
QUICK_SECONDS = 10.0
"""Less of it while training waits."""
FIRST_RECHECK_SECONDS = 10.0
FINISHED = ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "LAUNCH_FAILED", "NODE_FAIL", "OUT_OF_MEMORY",
            "PREEMPTED", "REVOKED", "TIMEOUT")  # fmt: skip
"""States of a job that does nothing any more (squeue's manual). Every other one, SUSPENDED or STAGE_OUT say, is a job
that still holds its run folder or will."""
_TIME_LEFT = re.compile(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)")


@dataclass(frozen=True)
class JobState:
    """What Slurm says about a job."""

    state: str
    """Such as RUNNING, PENDING or FAILED."""
    reason: str
    """Why it waits, or why it ended; "None" where there is nothing to say."""
    nodes: str
    """In Slurm's short form; empty while it waits."""
    restarts: int
    run_time: str
    """Since its newest start, as days-hours:minutes:seconds."""
    time_limit: str

    @property
    def is_alive(self) -> bool:
        """Whether it runs or will run; where Slurm names a state that is not known here, too."""
        return self.state not in FINISHED


def require_sbatch() -> None:
    """Raise BadInput where jobs cannot be submitted."""
    if shutil.which("sbatch") is None:
        raise BadInput("--submit: sbatch is not on this machine; submit from a login node, or take --print's script")


def submit(script: Path, environment: Mapping[str, str]) -> str:
    """Submit a batch script from its folder, where its log goes, and return the job's id.

    A job that is submitted from inside another one must not inherit that one's layout. Raises BadInput where Slurm
    refuses the job, ClDistError where it cannot be told whether there is one.
    """
    inherited = {name: value for name, value in environment.items() if not _is_of_a_job(name)}
    done = _ask(["sbatch", "--parsable", script.name], PATIENCE_SECONDS, cwd=script.parent, environment=inherited)
    if done is None:
        raise ClDistError(f"sbatch did not answer in {PATIENCE_SECONDS:g} s; look with squeue whether the job is there")
    if done.returncode != 0:
        raise BadInput(f"Slurm refuses the job: {_first_line(done.stderr)}")
    number = done.stdout.strip().partition(";")[0]  # with several clusters: 17;cluster
    if not number.isdecimal():
        raise ClDistError(f"sbatch gave no job's number ({number[:80]!r}); look with squeue whether the job is there")
    return number


def job_state(job: str) -> JobState | None:
    """What Slurm says about a job; None where there is no Slurm, no answer, or the job is forgotten."""
    done = _ask(["scontrol", "--oneliner", "show", "job", job], PATIENCE_SECONDS)
    if done is None or done.returncode != 0:
        return None
    found = dict(re.findall(r"(?:^| )(JobState|Reason|NodeList|Restarts|RunTime|TimeLimit)=(\S*)", done.stdout))
    return JobState(
        state=found.get("JobState", "UNKNOWN"),
        reason=found.get("Reason", "None"),
        nodes="" if found.get("NodeList") == "(null)" else found.get("NodeList", ""),
        restarts=int(found.get("Restarts", "0")),
        run_time=found.get("RunTime", ""),
        time_limit=found.get("TimeLimit", ""),
    )


class TimeLeft:
    """How much time is left to the job that this process is in.

    Slurm is asked seldom: anew when half of the time that it named has passed, since an administrator may change the
    limit. Where it does not answer, what is known goes on to count.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        """`environment`: SLURM_JOB_ID tells the job, SLURM_JOB_END_TIME (newer releases) its end."""
        self._job = environment.get("SLURM_JOB_ID")
        end = environment.get("SLURM_JOB_END_TIME", "")
        self._end = float(end) if end.isdecimal() else None
        """Seconds since the epoch; None where there is no limit, or none is known yet."""
        self._ask_at = 0.0 if self._end is None else self._recheck(self._end - time.time())
        """When to ask again, on the monotonic clock."""

    def __call__(self) -> float | None:
        """Seconds until Slurm ends the job; None where there is no job or no limit."""
        if self._job is None:
            return None
        if time.monotonic() >= self._ask_at:
            self._ask(self._job)
        return None if self._end is None else self._end - time.time()

    def _ask(self, job: str) -> None:
        done = _ask(["squeue", "--noheader", f"--jobs={job}", "--format=%L"], QUICK_SECONDS)
        answer = done.stdout.strip() if done is not None and done.returncode == 0 else ""
        left = parse_time_left(answer)
        if left is not None:
            self._end = time.time() + left
        elif answer == "UNLIMITED":
            self._end = None
        self._ask_at = self._recheck(None if self._end is None else self._end - time.time())

    @staticmethod
    def _recheck(left: float | None) -> float:
        wait = 3600.0 if left is None else max(FIRST_RECHECK_SECONDS, left / 2)
        return time.monotonic() + wait


def parse_time_left(text: str) -> float | None:
    """Squeue's days-hours:minutes:seconds in seconds; None for anything else (UNLIMITED, NOT_SET, INVALID)."""
    match = _TIME_LEFT.fullmatch(text)
    if match is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return float(86400 * days + 3600 * hours + 60 * minutes + seconds)


def _ask(
    command: Sequence[str], patience: float, cwd: Path | None = None, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str] | None:
    """Run one of Slurm's commands; None where it is not there or does not answer."""
    try:
        return subprocess.run(
            command, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            errors="replace", timeout=patience, check=False,
        )  # fmt: skip
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None


def _is_of_a_job(name: str) -> bool:
    return name.startswith(("SLURM_", "SLURMD_")) and name != "SLURM_CONF"


def _first_line(text: str) -> str:
    lines = [line.removeprefix("sbatch: ").removeprefix("error: ") for line in text.splitlines() if line.strip()]
    return lines[0] if lines else "sbatch gave no reason"
