"""Tokenised data in files: shared, never stale, and no reason for a run to fail, whatever happens to the files."""

from __future__ import annotations

import errno
import json
import logging
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from cl_dist.errors import BadInput
from cl_dist.state import token_cache
from cl_dist.state.token_cache import TokenCache
from cl_dist.tasks.samples import Table, pack, whole
from cl_dist.tasks.types import IGNORE, Encoded
from tests.ranks import REPOSITORY

KEY = "ab" * 32
SAMPLES = [Encoded(n, [n, n + 1, 65_530], [IGNORE, IGNORE, 65_530]) for n in range(3000)]
APART = [Encoded(n, [n] * (n % 3), [n, 70_000]) for n in range(50)]


class Encoding:
    """Encodes the samples, and counts how often."""

    def __init__(self, samples: list[Encoded] = SAMPLES) -> None:
        self.samples, self.times = samples, 0

    def __call__(self) -> Iterator[Encoded]:
        self.times += 1
        yield from self.samples


def is_mapped(table: Table) -> bool:
    """Whether the arrays are pages of a file."""
    address = table.starts.ctypes.data
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(end, 16) for end in line.split()[0].split("-"))
        if first <= address < last:
            return ".safetensors" in line
    return False


@pytest.mark.parametrize("samples", [SAMPLES, APART, []], ids=["stretches", "apart", "none"])
def test_the_second_start_maps_what_the_first_one_wrote(tmp_path: Path, samples: list[Encoded]) -> None:
    encode, folder = Encoding(samples), tmp_path / "new" / "tokens"
    tables = [TokenCache(folder)(KEY, encode) for _ in range(3)]
    assert encode.times == 1
    for table in tables:
        assert is_mapped(table)
        assert list(whole(table)) == samples
        for name in ("ids", "starts", "spans", "labels", "label_starts", "index", "targets"):
            expected = getattr(pack(samples), name)
            assert getattr(table, name).dtype == expected.dtype
            assert np.array_equal(getattr(table, name), expected)
    assert {path.name for path in folder.iterdir()} == {".lock-ab", f"{KEY}.safetensors"}


def test_other_data_has_another_file(tmp_path: Path) -> None:
    cache = TokenCache(tmp_path)
    assert list(whole(cache(KEY, Encoding()))) == SAMPLES
    assert list(whole(cache("cd" * 32, Encoding(APART)))) == APART
    assert list(whole(cache(KEY, Encoding(APART)))) == SAMPLES


def test_a_table_keeps_no_file_open_and_its_pages_go_with_it(tmp_path: Path) -> None:
    """A stream of a thousand tasks would otherwise need twice as many open files as most systems allow."""
    cache, maps = TokenCache(tmp_path), Path("/proc/self/maps")
    before = len(os.listdir("/proc/self/fd"))
    tables = [cache(f"{number:064x}", Encoding(APART)) for number in range(5)]
    assert len(os.listdir("/proc/self/fd")) == before
    assert maps.read_text().count(str(tmp_path)) == 5
    ids = tables[0].ids
    tables.clear()
    assert maps.read_text().count(str(tmp_path)) == 1
    assert ids.tolist() == pack(APART).ids.tolist()
    with pytest.raises(ValueError, match="read-only"):
        ids[0] = 1
    del ids
    assert str(tmp_path) not in maps.read_text()


def damage_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a bit": damage_bit,
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-5]),
    "nearly empty": lambda path: path.write_bytes(b"abc"),
    "empty": lambda path: path.write_bytes(b""),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"more"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_file_is_noticed_and_written_again(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    TokenCache(tmp_path)(KEY, Encoding())
    path = tmp_path / f"{KEY}.safetensors"
    intact = path.read_bytes()
    path.chmod(0o600)
    DAMAGES[name](path)
    encode = Encoding()
    with caplog.at_level(logging.WARNING):
        assert list(whole(TokenCache(tmp_path)(KEY, encode))) == SAMPLES
    assert encode.times == 1
    assert "is damaged" in caplog.text
    assert path.read_bytes() == intact
    assert is_mapped(TokenCache(tmp_path)(KEY, Encoding([])))


def test_a_file_of_another_release_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_cache, "FORMAT", "0")
    TokenCache(tmp_path)(KEY, Encoding(APART))
    monkeypatch.undo()
    assert list(whole(TokenCache(tmp_path)(KEY, Encoding()))) == SAMPLES


def private(cache: TokenCache, caplog: pytest.LogCaptureFixture, key: str | None = KEY) -> str:
    """The one notice about data that this process keeps for itself."""
    encode = Encoding()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            table = cache(key, encode)
            assert list(whole(table)) == SAMPLES
            assert not is_mapped(table)
    assert encode.times == 2
    (record,) = caplog.records
    return record.getMessage()


def test_without_a_key_nothing_is_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert "cannot be compared between runs" in private(TokenCache(tmp_path / "new"), caplog, key=None)
    assert not (tmp_path / "new").exists()


def test_a_folder_that_cannot_be_one_is_no_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    notice = private(TokenCache(tmp_path / "file" / "tokens"), caplog)
    assert notice.startswith("tokenised data is not cached, so every rank tokenises it for itself: ")
    assert "Not a directory" in notice


@pytest.fixture
def as_nobody() -> Iterator[Path]:
    """A folder of this user, while the process acts for one who may only read it: root may write everywhere."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        TokenCache(folder)(KEY, Encoding())
        for path, mode in [*((path, 0o444) for path in folder.iterdir()), (folder, 0o555)]:
            path.chmod(mode)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65_534)
        yield folder
        os.seteuid(user)
        folder.chmod(0o755)


def test_a_read_only_folder_is_used_for_what_it_has(as_nobody: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert is_mapped(TokenCache(as_nobody)(KEY, Encoding([])))
    encode = Encoding()
    with caplog.at_level(logging.WARNING):
        assert not is_mapped(TokenCache(as_nobody)("cd" * 32, encode))
    assert "Permission denied" in caplog.text


def test_a_full_disk_is_no_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The limit on the size of files fails writes halfway, as a full disk or a quota does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        notice = private(TokenCache(tmp_path), caplog)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert os.strerror(errno.EFBIG) in notice
    assert [path.name for path in tmp_path.iterdir()] == [".lock-ab"]


def test_a_file_system_without_locks_is_no_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(token_cache.fcntl, "flock", refuse)
    assert "has no locks" in private(TokenCache(tmp_path), caplog)


def test_an_error_while_encoding_is_everyones_own(tmp_path: Path) -> None:
    def fail() -> Iterator[Encoded]:
        yield SAMPLES[0]
        raise BadInput("task 't', training sample 1: too long")

    for _ in range(2):
        with pytest.raises(BadInput, match="training sample 1"):
            TokenCache(tmp_path)(KEY, fail)
    assert list(whole(TokenCache(tmp_path)(KEY, Encoding()))) == SAMPLES


RANK = """
import json, os, sys, time
from pathlib import Path
from cl_dist.heartbeat import beat, last_beat
from cl_dist.state.token_cache import TokenCache
from cl_dist.tasks.samples import whole
from cl_dist.tasks.types import Encoded
beat("training")
folder, started = Path(sys.argv[1]), Path(sys.argv[2])
def encode():
    started.write_text(str(os.getpid()))
    print("encoded", flush=True)
    for number in range(3000):
        if number % 500 == 0:
            time.sleep(float(sys.argv[3]))
        yield Encoded(number, [number, 5], [number])
print(sum(sum(sample.input_ids) for sample in whole(TokenCache(folder)("ab" * 32, encode))), flush=True)
print(last_beat().phase, flush=True)
"""
SUM = str(sum(number + 5 for number in range(3000)))


def start(folder: Path, marker: Path, pause: float = 0.0) -> subprocess.Popen[str]:
    """A process that needs the entry; it writes `marker` when it begins to encode."""
    command = [sys.executable, "-c", RANK, str(folder), str(marker), str(pause)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)


def wait_for(path: Path) -> None:
    """Until a file is there."""
    for _ in range(3000):
        if path.exists():
            return
        time.sleep(0.01)
    raise AssertionError(f"{path} never came")


def test_one_process_encodes_and_a_killed_one_is_replaced(tmp_path: Path) -> None:
    """Three ranks wait for one that is killed in the middle: the next one encodes, and the others use that."""
    folder, first = tmp_path / "tokens", tmp_path / "first"
    doomed = start(folder, first, pause=60.0)
    wait_for(first)
    (folder / f".{KEY}.safetensors.tmp-{doomed.pid}").write_bytes(b"unfinished")
    others = [start(folder, tmp_path / f"other-{number}", pause=0.02) for number in range(3)]
    time.sleep(0.5)
    doomed.kill()
    doomed.wait()
    outputs = [process.communicate(timeout=60)[0].split() for process in others]
    # What comes after the wait is not reported as the wait.
    assert sorted(outputs) == [[SUM, "training"], [SUM, "training"], ["encoded", SUM, "training"]]
    assert {path.name for path in folder.iterdir()} == {".lock-ab", f"{KEY}.safetensors"}


def test_a_rank_waits_as_long_as_the_other_one_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Signs of life are far apart compared with the patience for a stuck process, but nearer than it."""
    monkeypatch.setattr(token_cache, "_STALLED_SECONDS", 2.0)
    monkeypatch.setattr(token_cache, "_SIGN_SECONDS", 0.0)
    monkeypatch.setattr(token_cache, "_POLL_SECONDS", 0.01)
    begun = threading.Event()

    def slowly() -> Iterator[Encoded]:
        begun.set()
        for number, sample in enumerate(SAMPLES):
            if number % 500 == 1:
                time.sleep(0.4)  # six times: longer than the patience, together
            yield sample

    worker = threading.Thread(target=lambda: TokenCache(tmp_path)(KEY, slowly))
    worker.start()
    begun.wait()
    encode = Encoding()
    assert is_mapped(TokenCache(tmp_path)(KEY, encode))
    worker.join()
    assert encode.times == 0


def test_a_stuck_process_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(token_cache, "_STALLED_SECONDS", 0.1)
    monkeypatch.setattr(token_cache, "_POLL_SECONDS", 0.01)
    go, begun = threading.Event(), threading.Event()

    def stuck() -> Iterator[Encoded]:
        begun.set()
        go.wait()
        yield from SAMPLES

    worker = threading.Thread(target=lambda: TokenCache(tmp_path)(KEY, stuck))
    worker.start()
    begun.wait()
    try:
        assert "makes no progress" in private(TokenCache(tmp_path), caplog)
    finally:
        go.set()
        worker.join()


def test_checking_a_file_does_not_make_the_process_larger(tmp_path: Path) -> None:
    """Pages count as this process's memory once they are touched."""
    samples = (Encoded(n, [n % 60_000] * 1000, []) for n in range(20_000))
    TokenCache(tmp_path)(KEY, lambda: samples)
    code = (
        "import json, re, sys; from pathlib import Path; from cl_dist.state.token_cache import TokenCache\n"
        "def size(): return int(re.search(r'RssFile:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])\n"
        "before = size(); table = TokenCache(Path(sys.argv[1]))(sys.argv[2], None)\n"
        "print(json.dumps([table.ids.nbytes // 1024, size() - before]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), KEY], capture_output=True, text=True, cwd=REPOSITORY, check=True
    )
    stored, grown = json.loads(done.stdout)
    assert stored > 39_000
    assert grown < stored / 10
