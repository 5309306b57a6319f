from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from cl_dist.errors import BadInput, ClDistError
from cl_dist.launch.scheduler import JobState, TimeLeft, job_state, parse_time_left, require_sbatch, submit


@pytest.fixture
def without_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0:07", 7.0), ("12:00", 720.0), ("1:02:03", 3723.0), ("2-03:00:00", 183600.0),
     ("UNLIMITED", None), ("NOT_SET", None), ("INVALID", None), ("", None)],
)  # fmt: skip
def test_squeues_time_left(text: str, expected: float | None) -> None:
    assert parse_time_left(text) == expected


def test_outside_of_a_job_there_is_no_limit() -> None:
    assert TimeLeft({})() is None


@pytest.mark.usefixtures("without_slurm")
def test_without_an_answer_there_is_no_limit() -> None:
    assert TimeLeft({"SLURM_JOB_ID": "17"})() is None


@pytest.mark.usefixtures("without_slurm")
@pytest.mark.parametrize("left", [600, -5])
def test_the_end_may_be_in_the_environment(left: int) -> None:
    seconds_left = TimeLeft({"SLURM_JOB_ID": "17", "SLURM_JOB_END_TIME": str(int(time.time()) + left)})
    answer = seconds_left()
    assert answer is not None
    assert left - 2 < answer <= left


@pytest.mark.parametrize(
    ("state", "alive"),
    [("PENDING", True), ("RUNNING", True), ("COMPLETING", True), ("SUSPENDED", True), ("STOPPED", True),
     ("SIGNALING", True), ("RESIZING", True), ("STAGE_OUT", True), ("COMPLETED", False), ("CANCELLED", False),
     ("FAILED", False), ("TIMEOUT", False), ("NODE_FAIL", False), ("OUT_OF_MEMORY", False)],
)  # fmt: skip
def test_a_job_is_alive_unless_slurm_says_otherwise(state: str, alive: bool) -> None:
    assert JobState(state, "None", "", 0, "", "").is_alive is alive


@pytest.mark.usefixtures("without_slurm")
def test_without_slurm_nothing_is_known() -> None:
    assert job_state("17") is None
    with pytest.raises(BadInput, match="--submit: sbatch is not installed here"):
        require_sbatch()


@pytest.mark.parametrize(("said", "number"), [("17", "17"), ("17;north", "17"), ("", None), ("slurm 22.05.8", None)])
def test_sbatch_must_print_a_job_id(
    said: str, number: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sbatch = tmp_path / "sbatch"
    sbatch.write_text(f"#!/bin/sh\necho '{said}'\n")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    if number is not None:
        assert submit(tmp_path / "job.sh", os.environ) == number
        return
    with pytest.raises(ClDistError, match="sbatch printed no job id"):
        submit(tmp_path / "job.sh", os.environ)
