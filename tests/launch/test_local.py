from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from cl_dist.launch import local
from cl_dist.launch.local import Ending, launch
from cl_dist.stop_requests import SAME_PRESS_SECONDS
from tests.test_collective_texts import LOST, TIMEOUT, WATCHDOG

PATIENCE_SECONDS = 30.0

PRELUDE = """
import json, os, signal, sys, time
from cl_dist.launch.child import die_with_launcher, report_failure
die_with_launcher(os.environ)
rank = int(os.environ["RANK"])
def fail(code, message):
    report_failure(os.environ, code, message)
    sys.exit(code)
def wait_for_the_others():
    open(f"ready-{rank}", "w").close()
    while not all(os.path.exists(f"ready-{other}") for other in range(int(os.environ["WORLD_SIZE"]))):
        time.sleep(0.01)
def checkpoint_when_asked(seconds=0.3):
    def stop(number, frame):
        with open(f"asked-{rank}", "a") as file:
            file.write(f"{signal.Signals(number).name} ")
        time.sleep(seconds)
        fail(75, "stopped after step 3")
    for asked in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(asked, stop)
"""


def heed_hangups() -> None:
    """Runs in a child process: the tests may run under nohup, which children inherit."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of the ranks."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def script(body: str) -> list[str]:
    """A command that runs a rank with this body."""
    return [sys.executable, "-c", PRELUDE + body]


def start(body: str, processes: int = 2, grace_seconds: float = 1.0) -> Ending:
    """Launch ranks with this body."""
    return launch(script(body), processes, os.environ, grace_seconds)


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for a condition, with a time limit."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    """Whether a process is running; a zombie is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_ranks_find_their_place_and_each_other(folder: Path) -> None:
    ending = start("json.dump(dict(os.environ), open(f'env-{rank}', 'w'))", processes=3)
    assert ending == Ending(0)
    environments = [json.loads((folder / f"env-{rank}").read_text()) for rank in range(3)]
    assert [environment["RANK"] for environment in environments] == ["0", "1", "2"]
    assert [environment["LOCAL_RANK"] for environment in environments] == ["0", "1", "2"]
    assert {(e["WORLD_SIZE"], e["LOCAL_WORLD_SIZE"], e["MASTER_ADDR"]) for e in environments} == {
        ("3", "3", "127.0.0.1")
    }
    assert len({environment["MASTER_PORT"] for environment in environments}) == 1


def test_each_rank_has_its_own_session(folder: Path) -> None:
    start("open(f'session-{rank}', 'w').write(str(os.getsid(0) == os.getpid()))")
    assert (folder / "session-1").read_text() == "True"


def test_only_the_first_ranks_output_is_shown(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    start("print('out of', rank, flush=True); print('err of', rank, file=sys.stderr)")
    shown = capfd.readouterr()
    assert (shown.out, shown.err) == ("out of 0\n", "err of 0\n")


def test_a_rank_that_writes_a_lot_is_not_blocked(folder: Path) -> None:
    assert start("print('x' * 1_000_000)") == Ending(0)


class TestFailures:
    """If one rank fails, the others end too, and its message comes last."""

    def test_a_killed_rank_takes_the_others_down(self, folder: Path) -> None:
        ending = start("wait_for_the_others()\nos.kill(os.getpid(), 9) if rank == 1 else time.sleep(600)")
        assert ending == Ending(1, "rank 1 was killed by SIGKILL")

    def test_a_rank_that_ignores_the_signal_is_killed(self, folder: Path) -> None:
        began = time.monotonic()
        body = "wait_for_the_others()\nrank or fail(1, 'no')\ntime.sleep(600)"
        assert start("signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + body) == Ending(1, "rank 0: no")
        assert time.monotonic() - began < PATIENCE_SECONDS

    def test_processes_that_a_failed_rank_started_are_killed_too(self, folder: Path) -> None:
        body = "import subprocess\nopen('pid', 'w').write(str(subprocess.Popen(['sleep', '600']).pid))\nfail(1, 'no')"
        start(body, processes=1)
        wait_until(lambda: not is_alive(int((folder / "pid").read_text())))

    @pytest.mark.parametrize(
        ("body", "code"),
        [
            ("signal.signal(signal.SIGTERM, signal.SIG_IGN)\nwait_for_the_others()\nfail(2 if rank else 1, 'no')", 2),
            ("fail(3, 'no')", 1),
            ("fail(75, 'stopped')", 75),
            ("wait_for_the_others()\nfail(75, 'stopped') if rank else fail(1, 'no')", 1),
            ("fail(75, 'stopped') if rank else None", 75),
            # Inside a library that waits for rank 1, rank 0 does not notice that it is asked to stop.
            ("wait_for_the_others()\nfail(75, 'stopped') if rank else time.sleep(30) or fail(1, 'no')", 75),
        ],
    )
    def test_the_exit_code(self, body: str, code: int, folder: Path) -> None:
        assert start(body).exit_code == code

    def test_the_message_is_that_of_the_rank_that_failed_first(self, folder: Path) -> None:
        body = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if rank == 2:
    report_failure(os.environ, 1, "the disk is full")
    open("said", "w").close()
while not os.path.exists("said"):
    time.sleep(0.01)
rank == 2 and time.sleep(0.2)  # it reports first, and ends last
fail(1, "lost my peer") if rank < 2 else sys.exit(1)
"""
        assert start("wait_for_the_others()\n" + body, processes=3) == Ending(1, "rank 2: the disk is full")

    def test_a_killed_rank_comes_before_ranks_that_noticed_its_death(self, folder: Path) -> None:
        body = """
import fcntl
alive = open("alive", "w")
rank and fcntl.flock(alive, fcntl.LOCK_EX)
wait_for_the_others()
rank and os.kill(os.getpid(), 9)
fcntl.flock(alive, fcntl.LOCK_EX)  # which the death of rank 1 releases
fail(1, "connection closed by peer")
"""
        assert start(body).message == "rank 1 was killed by SIGKILL"

    def test_a_rank_that_aborts_over_a_lost_peer_does_not_come_first(self, folder: Path) -> None:
        body = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if rank == 0:
    while not os.path.exists("said"):
        time.sleep(0.01)
    os.abort()
report_failure(os.environ, 1, "the disk is full")
open("said", "w").close()
time.sleep(0.5)
sys.exit(1)
"""
        assert start(body).message == "rank 1: the disk is full"

    @pytest.mark.parametrize("culprit", [0, 1])
    @pytest.mark.parametrize(
        ("said", "message"),
        [
            (WATCHDOG + TIMEOUT, "waited longer than launch.timeout_seconds for the others, and was ended by torch ("),
            (
                WATCHDOG + LOST[1][0],
                "lost another rank, which has ended or cannot be reached, and was ended by torch (",
            ),
            ("free(): invalid pointer", "was killed by SIGABRT: a library gave up, torch for example when an NCCL"),
        ],
    )
    def test_a_rank_that_torch_aborts_says_why(self, folder: Path, culprit: int, said: str, message: str) -> None:
        body = f"rank == {culprit} or time.sleep(600)\nprint({said!r}, file=sys.stderr, flush=True)\nos.abort()"
        ending = start(body)
        assert ending.exit_code == 1
        assert ending.message is not None
        assert ending.message.startswith(f"rank {culprit} {message}")
        assert said == "free(): invalid pointer" or ending.message.endswith("with --resume")

    def test_a_message_of_all_ranks_is_reported_once_without_a_rank(self, folder: Path) -> None:
        # The last rank is later by far more than the launcher's poll.
        body = "wait_for_the_others()\ntime.sleep(0.3 * rank)\nfail(2, 'train.epochs: no')"
        assert start(body) == Ending(2, "train.epochs: no")

    def test_bad_input_on_one_rank_names_it(self, folder: Path) -> None:
        body = "wait_for_the_others()\nrank and fail(2, 'no data')\ntime.sleep(600)"
        assert start(body) == Ending(2, "rank 1: no data")

    def test_the_output_of_a_rank_without_a_message_is_quoted(self, folder: Path) -> None:
        ending = start("rank and sys.exit('import failed')\ntime.sleep(600)")
        assert ending == Ending(1, "rank 1 ended with exit code 1", ("import failed",))

    def test_a_message_about_the_whole_job_gets_no_rank(self, folder: Path) -> None:
        body = (
            "rank or report_failure(os.environ, 1, 'rank 1 gives no sign of life', whole_job=True)\nrank or sys.exit(1)"
        )
        assert start(body + "\ntime.sleep(600)") == Ending(1, "rank 1 gives no sign of life")

    def test_another_port_is_tried_if_one_is_taken(self, folder: Path) -> None:
        body = """
with open(f"ports-{rank}", "a") as file:
    file.write(os.environ["MASTER_PORT"] + " ")
if len(open(f"ports-{rank}").read().split()) < 3:
    fail(1, "DistNetworkError: EADDRINUSE")
"""
        assert start(body, processes=1) == Ending(0)
        assert len(set((folder / "ports-0").read_text().split())) == 3

    def test_only_this_launchs_buffers_are_removed(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(local, "SHARED_MEMORY", folder)
        other = folder / f"deepspeed_allreduce_buffer_{os.getuid()}_127.0.0.1_1_0"
        other.touch()
        body = """
name = f"deepspeed_allreduce_buffer_{os.getuid()}_127.0.0.1_{os.environ['MASTER_PORT']}_{rank}"
open(name, "w").close()
os.kill(os.getpid(), 9)
"""
        start(body)
        assert list(folder.glob("deepspeed*")) == [other]


LAUNCHER = """
import os, sys
from pathlib import Path
from cl_dist.launch.local import launch
Path("launcher").write_text(str(os.getpid()))
ending = launch([sys.executable, "-c", sys.argv[1]], 2, os.environ, 1.0)
print(ending.message)
sys.exit(ending.exit_code)
"""


DRAWER = """
rank and sys.exit()
from cl_dist.launch.child import terminal
from cl_dist.output import steady_output
from cl_dist.progress import make_reporter
with steady_output():
    reporter = make_reporter(rank, sys.stdout, terminal(os.environ))
    reporter.run_started(["spring"], 1)
    reporter.task_started(0, "spring", 4)
    reporter.step(2, 0.5, 100.0, 1e-3)
    size = reporter.reporter.console.size
    reporter.close()
print("columns", size.width, "lines", size.height)
"""


def drawn_by(body: str) -> tuple[int, bytes]:
    """Exit code of a launcher on a terminal whose ranks run this body, and what the terminal shows."""
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 33, 111, 0, 0))
    command = [sys.executable, "-c", LAUNCHER, PRELUDE + body]
    environment = {**os.environ, "TERM": "xterm-256color"}
    for name in ("JPY_PARENT_PID", "PAGER", "GIT_PAGER"):
        environment.pop(name, None)
    process = subprocess.Popen(command, stdout=slave, stderr=slave, env=environment, start_new_session=True)
    os.close(slave)
    drawn = b""
    with suppress(OSError):  # EIO: all is read
        while data := os.read(master, 1 << 16):
            drawn += data
    os.close(master)
    return process.wait(timeout=PATIENCE_SECONDS), drawn


def test_the_first_rank_draws_on_the_launchers_terminal(folder: Path) -> None:
    code, drawn = drawn_by(DRAWER)
    assert code == 0, drawn
    assert b"\x1b[?25h" in drawn
    assert b"2/4" in drawn
    assert b"columns 111 lines 33" in drawn


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), 9)", "fail(75, 'stopped')"])
def test_a_rank_that_ends_while_it_draws_leaves_a_cursor_at_the_start_of_a_line(end: str, folder: Path) -> None:
    """A request to stop during imports ends a rank at once, too."""
    body = DRAWER.replace("size = ", f"open('ready', 'w')\n    sys.stdout.flush()\n    {end}\n    size = ")
    body = body.replace("fail(75, 'stopped')", "report_failure(os.environ, 75, 'stopped')\n    os._exit(75)")
    code, drawn = drawn_by(body)
    assert code == (75 if "75" in end else 1)
    assert drawn.rindex(b"\x1b[?25h") > drawn.rindex(b"\x1b[?25l")
    assert re.search(rb"\x1b\[\?25h\r\n[a-z0-9 ]*(SIGKILL|stopped)\r\n$", drawn), drawn


def test_a_rank_that_fails_after_its_bars_leaves_no_empty_line(folder: Path) -> None:
    code, drawn = drawn_by(
        DRAWER.replace("print(", "print('last words'); sys.stdout.write('\\x1b[0m'); fail(1, 'no')\nprint(")
    )
    assert code == 1
    assert drawn.endswith(b"last words\r\n\x1b[0mrank 0: no\r\n"), drawn


class TestStopped:
    """A rank stopped by SIGSTOP cannot act, and a single rank has no peer that would notice."""

    @pytest.fixture(autouse=True)
    def hurried(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Act soon after `hang_seconds`."""
        monkeypatch.setattr(local, "SUSPENDED_SECONDS", 0.5)

    def test_it_is_killed_in_time_and_named(self, folder: Path) -> None:
        began = time.monotonic()
        body = "rank and os.kill(os.getpid(), signal.SIGSTOP)\ntime.sleep(600)"
        ending = launch(script(body), 2, os.environ, 1.0, hang_seconds=1.0)
        assert ending.exit_code == 1
        assert (ending.message or "").startswith("rank 1 was stopped (SIGSTOP) for 2 s (launch.hang_seconds)")
        assert time.monotonic() - began < PATIENCE_SECONDS

    def test_the_count_restarts_when_a_rank_continues(self, folder: Path) -> None:
        process = subprocess.Popen(["sleep", "600"], text=True)
        rank = local._Rank(0, process, folder / "failure")
        assert rank.count_suspended(2.0) == 0.0
        for _ in range(2):
            process.send_signal(signal.SIGSTOP)
            wait_until(lambda: rank.count_suspended(2.0) > 0.0)
            assert [rank.count_suspended(2.0) for _ in range(2)] == [4.0, 6.0]
            process.send_signal(signal.SIGCONT)
            wait_until(lambda: rank.count_suspended(2.0) == 0.0)
        process.kill()
        process.wait()

    def test_without_a_limit_the_launcher_waits(self, folder: Path) -> None:
        wake = "import subprocess\nsubprocess.Popen(['sh', '-c', f'sleep 2; kill -CONT {os.getpid()}'])\n"
        assert start(wake + "os.kill(os.getpid(), signal.SIGSTOP)", processes=1) == Ending(0)


class TestSignals:
    """Signals to a launcher in a separate process."""

    @pytest.fixture
    def launcher(self, folder: Path) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
        """Start a launcher whose ranks run a body; kill it at the end."""
        started: list[subprocess.Popen[str]] = []

        def begin(body: str, *prefix: str) -> subprocess.Popen[str]:
            command = [*prefix, sys.executable, "-c", LAUNCHER, PRELUDE + body]
            started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=heed_hangups))
            wait_until(lambda: all((folder / f"ready-{rank}").exists() for rank in range(2)))
            return started[-1]

        yield begin
        for process in started:
            process.kill()
            process.communicate()

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
    def test_a_signal_is_forwarded_once_and_the_ranks_save(
        self, number: int, folder: Path, launcher: Callable[[str], subprocess.Popen[str]]
    ) -> None:
        process = launcher("checkpoint_when_asked()\nwait_for_the_others()\ntime.sleep(600)")
        process.send_signal(number)
        output, _ = process.communicate(timeout=PATIENCE_SECONDS)
        assert (process.returncode, output) == (75, "stopped after step 3\n")
        passed_on = "SIGUSR1 " if number == signal.SIGUSR1 else "SIGTERM "  # a warning stays one
        assert [(folder / f"asked-{rank}").read_text() for rank in range(2)] == [passed_on] * 2

    def test_two_at_once_are_one_request(self, folder: Path, launcher: Callable[[str], subprocess.Popen[str]]) -> None:
        process = launcher("checkpoint_when_asked()\nwait_for_the_others()\ntime.sleep(600)")
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=PATIENCE_SECONDS)
        assert process.returncode == 75

    def test_a_second_one_kills(self, folder: Path, launcher: Callable[[str], subprocess.Popen[str]]) -> None:
        process = launcher("signal.signal(signal.SIGTERM, signal.SIG_IGN)\nwait_for_the_others()\ntime.sleep(600)")
        process.send_signal(signal.SIGINT)
        time.sleep(2 * SAME_PRESS_SECONDS)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=PATIENCE_SECONDS)
        assert process.returncode == 1
        assert output.startswith("killed by a second signal")

    def test_a_time_limit_after_its_warning_does_not_kill(
        self, folder: Path, launcher: Callable[[str], subprocess.Popen[str]]
    ) -> None:
        """Slurm's signals to the processes of a batch script; at the second one, the ranks may be saving."""
        process = launcher("checkpoint_when_asked(seconds=3)\nwait_for_the_others()\ntime.sleep(600)")
        process.send_signal(signal.SIGUSR1)
        time.sleep(2 * SAME_PRESS_SECONDS)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=PATIENCE_SECONDS)
        assert (process.returncode, output) == (75, "stopped after step 3\n")

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
    def test_ranks_without_handlers_simply_end(
        self, number: int, folder: Path, launcher: Callable[[str], subprocess.Popen[str]]
    ) -> None:
        process = launcher("wait_for_the_others()\ntime.sleep(600)")
        process.send_signal(number)
        process.communicate(timeout=PATIENCE_SECONDS)
        assert process.returncode == 75

    def test_nohup_keeps_a_run_alive(self, folder: Path, launcher: Callable[..., subprocess.Popen[str]]) -> None:
        process = launcher("wait_for_the_others()\ntime.sleep(1)", "nohup")
        process.send_signal(signal.SIGHUP)
        process.communicate(timeout=PATIENCE_SECONDS)
        assert process.returncode == 0

    def test_ranks_die_with_a_killed_launcher(
        self, folder: Path, launcher: Callable[[str], subprocess.Popen[str]]
    ) -> None:
        body = "open(f'pid-{rank}', 'w').write(str(os.getpid()))\nwait_for_the_others()\ntime.sleep(600)"
        process = launcher(body)
        pids = [int((folder / f"pid-{rank}").read_text()) for rank in range(2)]
        assert all(is_alive(pid) for pid in pids)
        process.kill()
        wait_until(lambda: not any(is_alive(pid) for pid in pids))

    def test_a_rank_whose_launcher_is_already_gone_ends_at_once(self, folder: Path) -> None:
        environment = {**os.environ, "CL_DIST_LAUNCHER_PID": "1", "RANK": "0"}
        end = subprocess.run(script("print('alive')"), env=environment, capture_output=True, text=True, check=False)
        assert (end.returncode, end.stdout) == (-signal.SIGKILL, "")


def test_a_launcher_whose_children_would_be_forgotten_sees_how_they_end() -> None:
    """Shells of notebooks ignore SIGCHLD, and their children inherit that."""
    code = (
        "import os, signal, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN); "
        "from cl_dist.launch.local import launch; "
        "ends = [launch([sys.executable, '-c', f'exit({code})'], 1, os.environ) for code in (0, 3)]; "
        "print([end.exit_code for end in ends])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "[0, 1]\n", done.stderr
