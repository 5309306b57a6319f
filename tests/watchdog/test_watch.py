"""Real processes with real watchdogs, but without torch, so that a rank starts in a fraction of a second."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cl_dist.watchdog.peers import PulseFiles
from tests.ranks import REPOSITORY

HANG_SECONDS = 3.0
"""On a busy machine a healthy process may not run for a second."""
PATIENCE_SECONDS = 60.0
"""A watchdog that does not act is found after this time."""
FILES = (".heartbeat-rank0.json", ".heartbeat-rank1.json")

PRELUDE = """
import os, signal, sys, threading, time
from pathlib import Path
from cl_dist.heartbeat import beat
from cl_dist.watchdog import Watchdog
rank, world, folder, hang = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), float(sys.argv[4])
def end(message, speaks):
    print(message if speaks else "(silent)", flush=True)
    os._exit(9)
def work(seconds):
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        beat("working")
        time.sleep(0.02)
def wait():
    beat("waiting")
    time.sleep(600)
def dead_loop():
    beat("looping")
    while True:
        pass
with Watchdog(folder, rank, world, hang, end) as dog:
    work(0.3)
"""


class Ranks:
    """Ranks that each run a body."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: list[subprocess.Popen[str]] = []

    def start(self, *bodies: str, hang: float = HANG_SECONDS) -> None:
        for rank, body in enumerate(bodies):
            lines = "".join(f"    {line}\n" for line in body.splitlines())
            command = [sys.executable, "-c", PRELUDE + lines, str(rank), str(len(bodies)), str(self.folder), str(hang)]
            environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
            self.processes.append(
                subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            )

    def end(self, rank: int) -> tuple[int, str]:
        """Exit code and output."""
        output, _ = self.processes[rank].communicate(timeout=PATIENCE_SECONDS)
        return self.processes[rank].returncode, output

    def stack(self, rank: int) -> str:
        return (self.folder / f"stack-rank{rank}.txt").read_text()


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[Ranks]:
    started = Ranks(tmp_path / "logs")
    yield started
    for process in started.processes:
        process.kill()
        process.communicate()


def test_a_healthy_run_is_left_alone_and_leaves_no_files(ranks: Ranks) -> None:
    """One rank waits for well over the limit while the other one works."""
    ranks.start("work(5)", "time.sleep(5)")
    assert [ranks.end(rank) for rank in range(2)] == [(0, ""), (0, "")]
    assert list(ranks.folder.iterdir()) == []


def test_a_stopped_rank_is_named_and_the_others_end(ranks: Ranks) -> None:
    ranks.start("wait()", "os.kill(os.getpid(), signal.SIGSTOP)", "wait()")
    ends = [ranks.end(0), ranks.end(2)]
    assert [code for code, _ in ends] == [9, 9]
    said = [output for _, output in ends if output != "(silent)\n"]
    assert len(said) == 1
    assert said[0].startswith(
        "no progress for 3 s (launch.hang_seconds): rank 1 gives no sign of life, last seen while working"
    )
    assert "in wait" in ranks.stack(0)
    assert "in wait" in ranks.stack(2)
    assert ranks.processes[1].poll() is None, "a stopped process cannot end itself"


def test_the_end_of_the_rank_on_duty_is_noticed(ranks: Ranks) -> None:
    """While rank 1 is stopped, the rank that reads the others' files is killed."""
    ranks.start("wait()", "os.kill(os.getpid(), signal.SIGSTOP)", "wait()", "wait()")
    began = time.monotonic()
    while (signed := PulseFiles(ranks.folder, 4).signed()) is None:
        assert time.monotonic() - began < PATIENCE_SECONDS
        time.sleep(0.05)
    assert signed.rank != 1, "a stopped rank takes no duty"
    ranks.processes[signed.rank].kill()
    ends = [ranks.end(rank) for rank in {0, 2, 3} - {signed.rank}]
    assert [code for code, _ in ends] == [9, 9]
    said = [output for _, output in ends if output != "(silent)\n"]
    assert len(said) == 1
    first, second = sorted([1, signed.rank])
    assert f"ranks {first} and {second} give no sign of life" in said[0]


def test_a_dead_loop_is_named_with_its_place(ranks: Ranks) -> None:
    """The rank that waits for it stopped working later."""
    ranks.start("work(0.5)\nwait()", "dead_loop()")
    ends = [ranks.end(rank) for rank in range(2)]
    assert [code for code, _ in ends] == [9, 9]
    assert "rank 1 has made no progress for" in ends[0][1] + ends[1][1]
    assert "while looping, and the others wait for it" in ends[0][1] + ends[1][1]
    assert "in dead_loop" in ranks.stack(1)
    assert "in wait" in ranks.stack(0)
    assert "MainThread" in ranks.stack(1)


def test_a_rank_alone(ranks: Ranks) -> None:
    ranks.start("dead_loop()")
    code, output = ranks.end(0)
    assert code == 9
    assert output.startswith("no progress for 3 s (launch.hang_seconds): stuck while looping; stacks are in")


def test_time_while_all_ranks_are_suspended_does_not_count(ranks: Ranks) -> None:
    """As with `scontrol suspend`: no marks for longer than the limit, and yet no rank hangs."""
    ranks.start("time.sleep(1)\nwork(1)", "time.sleep(1)\nwork(1)")
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not all((ranks.folder / name).exists() for name in FILES):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for process in ranks.processes:
        process.send_signal(signal.SIGSTOP)
    time.sleep(4.0)
    for process in ranks.processes:
        process.send_signal(signal.SIGCONT)
    assert [ranks.end(rank) for rank in range(2)] == [(0, ""), (0, "")]


def test_a_library_that_uses_the_processor_is_at_work(ranks: Ranks) -> None:
    at_work = "beat('loading', opaque=True)\nbegan = time.monotonic()\nwhile time.monotonic() - began < 5: pass"
    ranks.start(at_work, "beat('loading', opaque=True)\ntime.sleep(5)")
    assert [ranks.end(rank) for rank in range(2)] == [(0, ""), (0, "")]


def test_a_library_that_waits_for_ever_hangs(ranks: Ranks) -> None:
    """The watchdog's own processor use does not count as work."""
    ranks.start(*["beat('loading', opaque=True)\ntime.sleep(600)"] * 2, hang=1.0)
    assert [ranks.end(rank)[0] for rank in range(2)] == [9, 9]


def test_a_rank_that_gives_up_makes_the_others_write_their_stacks(ranks: Ranks) -> None:
    """Well before `hang_seconds`: its collective operation took too long."""
    gives_up = "time.sleep(1.5)\nprint(dog.give_up('rank 0 waited', 'a traceback'), flush=True)"
    ranks.start(gives_up, "dead_loop()", hang=6)
    code, output = ranks.end(0)
    assert code == 0
    assert output.startswith("rank 0 waited; rank 1 has made no progress for")
    assert ranks.end(1) == (9, "(silent)\n")
    assert "in dead_loop" in ranks.stack(1)
    assert "a traceback" in ranks.stack(0)


@pytest.mark.parametrize("left_behind", [False, True], ids=["together", "after one that has died"])
def test_of_the_ranks_that_give_up_one_looks_at_the_others(ranks: Ranks, left_behind: bool) -> None:
    """The note of that rank ends the others; if it has died after its claim, another rank looks."""
    if left_behind:
        ranks.folder.mkdir()
        (ranks.folder / ".heartbeat-claim0").touch()
    gives_up = "time.sleep(0.5)\nprint(dog.give_up(f'rank {rank} waited', 'a traceback'), flush=True)"
    ranks.start(gives_up, gives_up, "dead_loop()", hang=6)
    ends = [ranks.end(rank) for rank in range(3)]
    assert sorted(code for code, _ in ends) == [0, 9, 9]
    assert ends[2] == (9, "(silent)\n")
    said = next(output for code, output in ends if code == 0)
    assert "rank 2 has made no progress for" in said
    assert "while looping, and the others wait for it" in said
    claims = sorted(path.name for path in ranks.folder.glob(".heartbeat-claim*"))
    assert claims == [".heartbeat-claim0", ".heartbeat-claim1"][: 1 + left_behind]


def test_a_crash_in_c_leaves_stacks(ranks: Ranks) -> None:
    """As torch does when an NCCL operation takes too long."""
    ranks.start("def deep():\n    os.abort()\ndeep()")
    assert ranks.end(0)[0] == -signal.SIGABRT
    assert "in deep" in ranks.stack(0)


def test_a_folder_that_does_not_answer_keeps_no_rank_alive(ranks: Ranks) -> None:
    """The note becomes a pipe without a reader: opening it blocks, as with a file server that is gone."""
    ranks.start("(folder / '.hang.json').unlink(missing_ok=True)\nos.mkfifo(folder / '.hang.json')\nwait()", "wait()")
    ends = [ranks.end(rank) for rank in range(2)]
    assert [code for code, _ in ends] == [9, 9]
    assert all("does not answer" in output for _, output in ends)


def test_prepare_deletes_what_an_earlier_job_left(tmp_path: Path) -> None:
    from cl_dist.watchdog import Watchdog

    for name in (*FILES, ".hang.json", "stack-rank1.txt"):
        (tmp_path / name).write_text("x")
    Watchdog.prepare(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["stack-rank1.txt"]


POLLING = """
def poll():
    while True:
        time.sleep(0.01)
        sum(range(2000))
threading.Thread(target=poll, daemon=True).start()
"""


def test_polling_threads_are_not_at_work(ranks: Ranks) -> None:
    """They use more than the threshold of the main thread, and less than a library's working threads."""
    ranks.start(*[f"{POLLING}beat('loading', opaque=True)\ntime.sleep(600)"] * 2, hang=2.0)
    assert [ranks.end(rank)[0] for rank in range(2)] == [9, 9]


def test_a_library_that_uses_its_own_threads_is_at_work(ranks: Ranks) -> None:
    at_work = "threading.Thread(target=dead_loop, daemon=True).start()\ntime.sleep(0.1)\n"
    ranks.start(f"{at_work}beat('tokenising', opaque=True)\ntime.sleep(5)")
    assert ranks.end(0) == (0, "")
