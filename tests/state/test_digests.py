"""A large file is read only once for all runs, and again as soon as it changes."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from cl_dist.errors import BadInput
from cl_dist.state import digests
from cl_dist.state.digests import file_digests


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """The files that were read completely. A few bytes count as large here, and a recent change as settled."""
    monkeypatch.setenv("CL_DIST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "WORTH_CACHING", 4)
    monkeypatch.setattr(digests, "_SETTLED_SECONDS", -1.0)
    found: list[Path] = []
    whole = digests.file_sha256

    def noted(path: Path) -> str:
        found.append(path)
        return whole(path)

    monkeypatch.setattr(digests, "file_sha256", noted)
    return found


def test_an_unchanged_file_is_read_once(read: list[Path], tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(b"12345678")
    expected = {"w": hashlib.sha256(b"12345678").hexdigest()}
    assert [file_digests([("w", path)]) for _ in range(3)] == [expected] * 3
    (tmp_path / "link").symlink_to(path)
    assert file_digests([("w", tmp_path / "link")]) == expected
    assert read == [path]


def test_one_with_the_same_size_and_time_is_read_again(read: list[Path], tmp_path: Path) -> None:
    """As after `cp -p` or `touch -r`: only the ctime has changed."""
    path = tmp_path / "weights.bin"
    path.write_bytes(b"12345678")
    before = path.stat()
    first = file_digests([("w", path)])
    path.write_bytes(b"87654321")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert file_digests([("w", path)]) != first
    assert len(read) == 2


def test_what_has_just_changed_is_not_trusted(
    read: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "_SETTLED_SECONDS", 60.0)
    path = tmp_path / "weights.bin"
    path.write_bytes(b"12345678")
    for _ in range(2):
        file_digests([("w", path)])
    assert len(read) == 2


@pytest.mark.parametrize("damage", ["{", "{}", '{"file": 1, "sha256": "x"}', "[]"])
def test_a_damaged_memory_is_not_believed(read: list[Path], tmp_path: Path, damage: str) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(b"12345678")
    first = file_digests([("w", path)])
    (memory,) = (tmp_path / "cache").rglob("*.json")
    memory.write_text(damage)
    assert file_digests([("w", path)]) == first
    assert len(read) == 2


def test_json_by_what_it_says(tmp_path: Path) -> None:
    contents = ['{"a": 1, "b": [2]}', '{\n "b": [2], "a": 1, "transformers_version": "5.1"}', '{"a": 2, "b": [2]}', "{"]
    for number, content in enumerate(contents):
        (tmp_path / f"{number}.json").write_text(content)
    found = file_digests((str(number), tmp_path / f"{number}.json") for number in range(len(contents)))
    assert found["0"] == found["1"]
    assert len(set(found.values())) == 3


def test_an_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"absent\.bin cannot be read: No such file"):
        file_digests([("w", tmp_path / "absent.bin")])
