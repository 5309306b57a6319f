"""Output of a command whose reader leaves, stops or never existed, with real processes and real pipes."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cl_dist import output
from cl_dist.output import BUFFER_BYTES, lost_output, steady_output

CL_DIST = str(Path(sys.executable).with_name("cl-dist"))
WORKER = """
import os, sys
from cl_dist import output
from cl_dist.output import fill_missing_descriptors, lost_output, steady_output
fill_missing_descriptors()
with steady_output(2.0):
    for number in range(int(sys.argv[2])):
        print("line", number, "of", sys.argv[1] * 400, flush=True)
        print("error", number, file=sys.stderr)
    output.drain_output()
    with open("done", "w") as file:
        file.write("\\n".join(["done", *lost_output()]))
"""
LINES = 5_000
"""Two megabytes of them: more than the buffer holds."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "worker.py").write_text(WORKER)
    return tmp_path


def shell(line: str, timeout: float = 60, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a line of bash, whose exit code is that of the first program of its pipe."""
    script = f"{line}; exit ${{PIPESTATUS[0]}}"
    environment = {**os.environ, "PYTHON": sys.executable, "CL_DIST": CL_DIST, **variables}
    return subprocess.run(
        ["bash", "-c", script], env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )


@pytest.mark.parametrize(
    ("redirection", "lost"),
    [
        ("| head -1", ["standard output were lost: its reader is gone"]),
        ("2>&1 | head -1", ["standard output were lost: its reader is gone"]),
        (">/dev/full", ["standard output were lost: write failed: No space left on device"]),
        (">/dev/full 2>&1", ["standard output were lost: write failed: No space left on device"]),
        (">/dev/null 2>/dev/full", ["standard error were lost: write failed: No space left on device"]),
        (">&-", []),
        ("2>&-", []),
        (">&- 2>&-", []),
        (">&- 2>&- <&-", []),
        ("| (exec sleep 3)", ["standard output were lost: its reader has stopped reading"]),
    ],
)
def test_a_command_outlives_the_loss_of_its_output(redirection: str, lost: list[str], folder: Path) -> None:
    done = shell(f'"$PYTHON" worker.py x {LINES} {redirection}')
    assert done.returncode == 0, done.stderr
    noted = (folder / "done").read_text().splitlines()
    assert (noted[0], [line.partition(" bytes of ")[2] for line in noted[1:]]) == ("done", lost)
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_lost_output_is_reported_once_on_the_other_stream(folder: Path) -> None:
    errors = shell(f'"$PYTHON" worker.py x {LINES} | head -1').stderr.splitlines()
    notes = [line for line in errors if line.startswith("cl-dist: note: ")]
    assert notes == ["cl-dist: note: standard output is lost: its reader is gone; the command keeps running"]


def test_a_reader_that_resumes_gets_everything_or_sees_the_gap(folder: Path) -> None:
    assert shell('"$PYTHON" worker.py x 2000 2>&1 | (sleep 0.2; cat > copy)').returncode == 0
    lines = [line for line in (folder / "copy").read_text().splitlines() if line.startswith("line")]
    assert [int(line.split()[1]) for line in lines] == list(range(2000))
    reader, writer = os.pipe()
    outlet = output.Outlet(writer, "the pipe")
    for _ in range(3 * BUFFER_BYTES // 2 // 1000):
        outlet.write(bytes(1000))
    assert outlet.lost_bytes > 0
    received = read_until(reader, lambda: outlet._size == 0)
    outlet.write(b"again")
    received += read_until(reader, lambda: outlet._size == 0)
    assert received.endswith(f"\n[cl-dist: {outlet.lost_bytes} bytes were lost here]\nagain".encode())
    assert received.count(0) + outlet.lost_bytes == 3 * BUFFER_BYTES // 2 // 1000 * 1000
    os.close(reader)
    outlet.drain()
    os.close(writer)


def test_draining_for_a_stopped_reader_ends() -> None:
    reader, writer = os.pipe()
    outlet, began = output.Outlet(writer, "the pipe", patience=0.2), time.monotonic()
    outlet.write(bytes(200_000))
    outlet.drain()
    assert time.monotonic() - began >= 0.2
    assert outlet.lost_bytes > 100_000
    os.close(reader)
    os.close(writer)


def read_until(reader: int, condition: Callable[[], bool]) -> bytes:
    """Read a pipe until a condition holds and nothing is left."""
    received = b""
    os.set_blocking(reader, False)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        over = condition()
        try:
            received += os.read(reader, 1 << 16)
        except BlockingIOError:
            if over:
                return received
            time.sleep(0.01)
    raise AssertionError("the pipe was not written")


def test_streams_into_one_file_keep_their_order(folder: Path) -> None:
    shell('"$PYTHON" worker.py x 300 >log 2>&1')
    words = [line.split()[:2] for line in (folder / "log").read_text().splitlines()]
    assert words == [[kind, str(number)] for number in range(300) for kind in ("line", "error")]


@pytest.mark.parametrize("locale", ["ascii", "latin-1", "utf-8"])
def test_no_character_is_an_error(locale: str, folder: Path) -> None:
    done = shell("\"$PYTHON\" worker.py $'\\u4efb\\xff' 1", PYTHONIOENCODING=locale, PYTHONUTF8="1")
    assert done.returncode == 0, done.stderr
    assert ("\\u4efb" in done.stdout) == (locale != "utf-8")
    assert "\\udcff" in done.stdout


def test_nested_it_does_nothing_and_the_streams_are_restored() -> None:
    before = sys.stdout, sys.stderr
    with steady_output():
        inner = sys.stdout
        with steady_output():
            assert sys.stdout is inner
        assert sys.stdout is inner
        assert lost_output() == []
    assert (sys.stdout, sys.stderr) == before


@pytest.mark.parametrize(
    ("line", "code", "errors"),
    [
        ("recipe --explain | true", 141, ""),
        ("recipe --explain 2>&1 | true", 141, ""),
        ("methods >/dev/full", 1, "cl-dist: error: standard output cannot be written: No space left on device\n"),
        ("--help >/dev/full", 1, "cl-dist: error: standard output cannot be written: No space left on device\n"),
        ("methods >/dev/full 2>/dev/full", 1, ""),
        ("methods >&-", 0, ""),
        ("status nothing 2>&-", 2, ""),
        ("status nothing 2>/dev/full", 2, ""),
        ("status nothing 2>&1 | true", 2, ""),
        ("run 2>/dev/full", 2, ""),
    ],
)
def test_a_command_that_only_prints_ends_like_other_programs(line: str, code: int, errors: str, folder: Path) -> None:
    done = shell(f'"$CL_DIST" {line}')
    assert (done.returncode, done.stderr) == (code, errors)


def test_it_waits_for_a_slow_reader(folder: Path) -> None:
    done = shell('"$CL_DIST" recipe --explain | (sleep 1; wc -l)')
    assert done.returncode == 0
    assert int(done.stdout) == len(shell('"$CL_DIST" recipe --explain').stdout.splitlines())


def test_a_terminal_that_goes_away(folder: Path) -> None:
    """As when an ssh connection is lost: every write fails."""
    master, slave = os.openpty()
    command = [sys.executable, "worker.py", "x", str(LINES)]
    process = subprocess.Popen(command, stdout=slave, stderr=slave, start_new_session=True)
    os.close(slave)
    os.read(master, 100)
    os.close(master)
    assert process.wait(timeout=60) == 0
    assert (folder / "done").read_text().endswith("standard output were lost: its reader is gone")


def test_a_pipe_that_another_process_made_non_blocking_loses_nothing(folder: Path) -> None:
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETFL, os.O_NONBLOCK)
    process = subprocess.Popen([sys.executable, "worker.py", "x", "2000"], stdout=writer, stderr=subprocess.DEVNULL)
    os.close(writer)
    time.sleep(0.2)
    with os.fdopen(reader, "rb") as stream:
        assert len(stream.read().splitlines()) == 2000
    assert process.wait() == 0


@pytest.mark.parametrize("manager", ["direct_output", "steady_output"])
def test_a_line_is_written_in_one_piece(folder: Path, manager: str) -> None:
    """Ranks of other launchers share a terminal. A pipe with O_DIRECT keeps separate writes separate."""
    reading, writing = os.pipe2(os.O_DIRECT)
    code = (
        f"import sys\nfrom cl_dist.output import {manager}\nwith {manager}():\n    print('one', 2, file=sys.stderr)\n"
    )
    code += "    print('begun', end='', file=sys.stderr)\n"
    subprocess.run([sys.executable, "-c", code], stderr=writing, timeout=30, check=True)
    os.close(writing)
    assert [os.read(reading, 100), os.read(reading, 100), os.read(reading, 100)] == [b"one 2\n", b"begun", b""]
    os.close(reading)


def test_a_fork_prints_by_itself(folder: Path) -> None:
    code = "import os\nfrom cl_dist.output import steady_output\nwith steady_output():\n    print('one', flush=True)\n"
    code += "    if os.fork():\n        os.wait()\n    else:\n        print('two', flush=True)\n        os._exit(0)\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, sorted(done.stdout.splitlines())) == (0, ["one", "two"])


def test_the_exit_code_of_a_broken_pipe() -> None:
    assert output.NO_READER == 128 + signal.SIGPIPE
