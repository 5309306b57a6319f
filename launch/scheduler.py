"""The Slurm commands that a run needs: submit a job, query its state, and query the time it has left."""

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
"""How long to wait for an answer; a busy controller answers late."""
QUICK_SECONDS = 10.0
"""The same while training waits."""
FIRST_RECHECK_SECONDS = 10.0
"""Shortest time between two queries of the time left."""
FINISHED = ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "LAUNCH_FAILED", "NODE_FAIL", "OUT_OF_MEMORY",
            "PREEMPTED", "REVOKED", "TIMEOUT")  # fmt: skip
"""States in which a job has ended (squeue's manual). In every other state, such as SUSPENDED or STAGE_OUT, the job
holds its run folder or will hold it."""
_TIME_LEFT = re.compile(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)")


@dataclass(frozen=True)
class JobState:
    """What Slurm says about a job."""

    state: str
    """Such as RUNNING, PENDING or FAILED."""
    reason: str
    """Why it waits or why it ended; "None" without a reason."""
    nodes: str
    """Slurm's node list; empty while the job waits."""
    restarts: int
    run_time: str
    """Since its latest start, as days-hours:minutes:seconds."""
    time_limit: str

    @property
    def is_alive(self) -> bool:
        """Whether it runs or will run; an unknown state counts as alive."""
        return self.state not in FINISHED


def require_sbatch() -> None:
    """Raise BadInput if this machine cannot submit jobs."""
    if shutil.which("sbatch") is None:
        raise BadInput("--submit: sbatch is not installed here; submit from a login node, or use --print's script")


def submit(script: Path, environment: Mapping[str, str]) -> str:
    """Submit a batch script from its folder, where its log goes, and return the job's id.

    Raises BadInput if Slurm rejects the job, ClDistError if it is unknown whether there is a job.
    """
    # Submitted from inside another job, the new job must not inherit that job's layout.
    inherited = {
        name: value
        for name, value in environment.items()
        if not name.startswith(("SLURM_", "SLURMD_")) or name == "SLURM_CONF"
    }
    done = _ask(["sbatch", "--parsable", script.name], PATIENCE_SECONDS, cwd=script.parent, environment=inherited)
    if done is None:
        raise ClDistError(f"sbatch did not answer within {PATIENCE_SECONDS:g} s; check with squeue if there is a job")
    if done.returncode != 0:
        lines = [line.removeprefix("sbatch: ").removeprefix("error: ") for line in done.stderr.splitlines()]
        reason = next((line for line in lines if line.strip()), "sbatch gave no reason")
        raise BadInput(f"Slurm rejects the job: {reason}")
    number = done.stdout.strip().partition(";")[0]  # with several clusters: 17;cluster
    if not number.isdecimal():
        raise ClDistError(f"sbatch printed no job id ({number[:80]!r}); check with squeue if there is a job")
    return number


def job_state(job: str) -> JobState | None:
    """The state of a job; None without Slurm, without an answer, or if Slurm has forgotten the job."""
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
    """How much time the job of this process has left.

    Slurm is queried rarely: again once half of the reported time has passed, since an administrator may change the
    limit. If it does not answer, its last answer stays valid.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        """`environment`: SLURM_JOB_ID names the job, SLURM_JOB_END_TIME (newer releases) its end."""
        self._job = environment.get("SLURM_JOB_ID")
        end = environment.get("SLURM_JOB_END_TIME", "")
        self._end = float(end) if end.isdecimal() else None
        """Seconds since the epoch; None without a limit, or while the limit is unknown."""
        self._ask_at = 0.0 if self._end is None else self._recheck(self._end - time.time())
        """When to query again, on the monotonic clock."""

    def __call__(self) -> float | None:
        """Seconds until Slurm ends the job; None without a job or without a limit."""
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
    """Convert squeue's days-hours:minutes:seconds to seconds; None for anything else (UNLIMITED, NOT_SET, INVALID)."""
    match = _TIME_LEFT.fullmatch(text)
    if match is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return float(86400 * days + 3600 * hours + 60 * minutes + seconds)


def _ask(
    command: Sequence[str], patience: float, cwd: Path | None = None, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str] | None:
    """Run a Slurm command; None if it is not installed or does not answer."""
    try:
        return subprocess.run(
            command, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            errors="replace", timeout=patience, check=False,
        )  # fmt: skip
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
