from __future__ import annotations

import errno
import multiprocessing
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cl_dist.errors import BadInput
from cl_dist.state import lock
from cl_dist.state.lock import RunLock, refuse_if_locked

ROOT = Path(__file__).parents[2]


def start(path: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.state.lock_job", str(path)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)


def first_line(job: subprocess.Popen[str]) -> str:
    assert job.stdout is not None
    return job.stdout.readline().strip()


@contextmanager
def holder(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock."""
    with start(path) as job:
        assert first_line(job) == "held"
        yield job
        job.kill()


def test_a_second_run_is_refused_by_pid_and_host(tmp_path: Path) -> None:
    with holder(tmp_path / ".lock") as job:
        message = re.escape(f"{tmp_path} is in use by process {job.pid} on {socket.gethostname()}")
        with pytest.raises(BadInput, match=message), RunLock(tmp_path / ".lock"):
            pass
        with pytest.raises(BadInput, match=message):
            refuse_if_locked(tmp_path / ".lock")


def test_the_refusal_says_what_to_do_if_the_machine_is_dead(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    with holder(path), pytest.raises(BadInput, match=rf"if its machine is dead, .* or delete {re.escape(str(path))}$"):
        refuse_if_locked(path)


def test_a_requeued_job_waits_for_the_lock_of_a_dead_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock of its dead predecessor is released after more time than any other process would wait."""
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.setattr(lock, "_NOTIFY_SECONDS", 0.5)
    said: list[str] = []
    with holder(tmp_path / ".lock") as job:
        timer = threading.Timer(2.0, job.kill)
        timer.start()
        with RunLock(tmp_path / ".lock", said.append):
            pass
        timer.join()
    who = f"process {job.pid} on {socket.gethostname()}"
    assert said == [f"waiting up to 300 s for the lock of {tmp_path}, which {who} holds"]


@pytest.mark.parametrize("restarts", [None, "", "0", "1"])
def test_others_are_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, restarts: str | None) -> None:
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    if restarts is not None:
        monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
    with holder(tmp_path / ".lock"):
        began = time.monotonic()
        with pytest.raises(BadInput):  # a read-only command does not wait
            refuse_if_locked(tmp_path / ".lock", None if restarts == "1" else print)
        assert time.monotonic() - began < 10


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK])
def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """No file system here lacks locks, so the call itself fails like on one that does."""

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("cl_dist.state.lock.fcntl.flock", refuse)
    sentence = re.escape(f"the file system of {tmp_path} cannot lock files ({os.strerror(number)})")
    with pytest.raises(BadInput, match=sentence + r".*mount option flock\), or choose another output_dir"):
        RunLock(tmp_path / ".lock").__enter__()


def test_death_releases_the_lock(tmp_path: Path) -> None:
    with holder(tmp_path / ".lock"):
        pass
    refuse_if_locked(tmp_path / ".lock")
    with RunLock(tmp_path / ".lock"):
        pass


def test_the_end_of_the_block_releases_the_lock(tmp_path: Path) -> None:
    for _ in range(2):
        with RunLock(tmp_path / ".lock"):
            pass


def test_children_do_not_keep_the_lock(tmp_path: Path) -> None:
    with RunLock(tmp_path / ".lock"):
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(30,))
        child.start()  # it inherits the open file
    try:
        refuse_if_locked(tmp_path / ".lock")
    finally:
        child.kill()
        child.join()


def test_looking_takes_nothing(tmp_path: Path) -> None:
    refuse_if_locked(tmp_path / ".lock")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ["", "{", "[]", "{}"])
def test_a_lock_without_a_readable_owner_is_still_refused(tmp_path: Path, content: str) -> None:
    with RunLock(tmp_path / ".lock"):
        (tmp_path / ".lock").write_text(content)
        with pytest.raises(BadInput, match="is in use by another process"):
            refuse_if_locked(tmp_path / ".lock")


def test_of_racing_processes_exactly_one_gets_the_lock(tmp_path: Path) -> None:
    jobs = [start(tmp_path / ".lock") for _ in range(4)]
    try:
        said = [first_line(job) for job in jobs]
        winner = jobs[said.index("held")]
        refused = [line for line in said if line != "held"]
        assert len(refused) == 3
        assert all(f"in use by process {winner.pid} on" in line for line in refused)
    finally:
        for job in jobs:
            job.communicate()
