from __future__ import annotations

import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cl_dist.errors import ClDistError
from cl_dist.state import atomic
from tests.opens import opened
from tests.state.publish_job import FILES

KILLS = 12


def test_a_file_is_replaced_and_nothing_is_left(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    atomic.write_json(path, {"completed": 1})
    atomic.write_json(path, {"matrix": [0.5, float("nan"), (float("inf"), None)], "name": "é"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"matrix": [0.5, None, [None, None]], "name": "é"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["manifest.json"]


def test_what_is_not_json_replaces_nothing(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    atomic.write_json(path, 1)
    with pytest.raises(TypeError):
        atomic.write_json(path, {"tensor": object()})
    assert path.read_text() == "1\n"
    assert len(list(tmp_path.iterdir())) == 1


def test_lines_are_appended_and_a_torn_line_harms_no_other(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    atomic.append_line(path, {"step": 1})
    with path.open("a") as file:
        file.write('{"step": 2, "lo')  # a kill in the middle of a write
    atomic.append_line(path, {"step": 3, "loss": float("nan")})
    first, torn, last = path.read_text().splitlines()
    assert json.loads(first) == {"step": 1}
    assert torn == '{"step": 2, "lo'
    assert json.loads(last) == {"step": 3, "loss": None}


def test_a_line_opens_no_file(tmp_path: Path) -> None:
    file = atomic.LineFile(tmp_path / "log.jsonl")
    with opened(tmp_path) as files:
        for step in range(100):
            file.append({"step": step})
    assert files == ["log.jsonl"]
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == list(range(100))


@pytest.mark.parametrize("change", ["renamed", "deleted", "replaced", "truncated", "cut off", "appended to"])
def test_a_line_goes_to_the_file_that_has_the_name(tmp_path: Path, change: str) -> None:
    path = tmp_path / "log.jsonl"
    file = atomic.LineFile(path)
    file.append({"step": 1})
    file.append({"step": 2})
    if change == "renamed":
        path.rename(tmp_path / "log.jsonl.1")
    elif change == "deleted":
        path.unlink()
    elif change == "replaced":
        (tmp_path / "other").write_text('{"st')
        (tmp_path / "other").rename(path)
    elif change == "truncated":
        os.truncate(path, len('{"step": 1}\n'))
    elif change == "cut off":
        os.truncate(path, len('{"step": 1}\n{"st'))
    else:
        atomic.append_line(path, {"step": 9})
    file.append({"step": 3})
    kept = {
        "truncated": ['{"step": 1}'],
        "replaced": ['{"st'],
        "cut off": ['{"step": 1}', '{"st'],
        "appended to": ['{"step": 1}', '{"step": 2}', '{"step": 9}'],
    }
    assert path.read_text().splitlines() == [*kept.get(change, []), '{"step": 3}']


def test_a_line_that_a_full_disk_cut_off_harms_no_other(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    file = atomic.LineFile(path)
    file.append({"step": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:  # the file may grow by five bytes; then the system refuses with an error, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 5, limits[1]))
        with pytest.raises(OSError, match="File too large"):
            file.append({"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    file.append({"step": 3})
    assert path.read_text().splitlines() == ['{"step": 1}', '{"ste', '{"step": 3}']


def publish_text(folder: Path, text: str) -> None:
    with atomic.publishing(folder) as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "text").write_text(text)


def test_a_folder_is_published_and_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "tasks" / "01-a" / "model"
    publish_text(folder, "old")
    publish_text(folder, "new")
    assert (folder / "sub" / "text").read_text() == "new"
    assert [entry.name for entry in folder.parent.iterdir()] == ["model"]


def test_an_error_while_writing_leaves_the_old_folder(tmp_path: Path) -> None:
    publish_text(tmp_path / "state", "old")
    with pytest.raises(FileNotFoundError), atomic.publishing(tmp_path / "state") as temporary:
        (temporary / "half").write_text((temporary / "missing").read_text())
    assert (tmp_path / "state" / "sub" / "text").read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["state"]


def test_staging_starts_empty(tmp_path: Path) -> None:
    (atomic.stage(tmp_path / "state") / "of a killed write").write_text("")
    assert list(atomic.stage(tmp_path / "state").iterdir()) == []


def test_recover_reverts_a_swap_that_was_cut_off(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint" / "task-01-step-000002"
    publish_text(folder, "old")
    (atomic.stage(folder) / "text").write_text("new")
    os.rename(folder, folder.with_name(f".{folder.name}.replaced"))  # the first of the two renames of `publish`
    atomic.recover(tmp_path)
    assert (folder / "sub" / "text").read_text() == "old"
    assert [entry.name for entry in folder.parent.iterdir()] == [folder.name]


def test_recover_finishes_a_swap_that_was_done(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    publish_text(folder, "new")
    shutil.copytree(folder, tmp_path / ".state.replaced")
    atomic.recover(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["state"]


def test_recover_leaves_everything_else_alone(tmp_path: Path) -> None:
    names = ["01-a.tmp-b", "01-x.replaced", "notes.tmp-1", ".lock"]
    for name in names:
        (tmp_path / name).write_text("")
    (tmp_path / ".manifest.json.tmp-77").write_text("half")
    atomic.recover(tmp_path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted(names)


@pytest.fixture
def file_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `in use` undeletable. Without an NFS server, the call itself fails like NFS does for an open file."""
    unlink = os.unlink

    def refusing(path: str | os.PathLike[str], *, dir_fd: int | None = None) -> None:
        if Path(path).name == "in use":
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        unlink(path, dir_fd=dir_fd)

    monkeypatch.setattr(os, "unlink", refusing)


@pytest.mark.usefixtures("file_in_use")
def test_a_file_in_use_keeps_nothing_from_being_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    publish_text(folder, "old")
    (folder / "in use").write_text("")
    for text in ("new", "newer"):
        (atomic.stage(folder) / "in use").write_text("")
        publish_text(folder, text)
        atomic.recover(tmp_path)
        assert (folder / "sub" / "text").read_text() == text
        assert not (folder / "in use").exists()
    left = sorted(entry.name for entry in tmp_path.iterdir())
    assert left[-1] == "state"
    assert all(".tmp-discarded-" in name for name in left[:-1])  # not .replaced, a name that may be needed again


@pytest.mark.usefixtures("file_in_use")
def test_what_stayed_is_deleted_at_another_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "state"
    publish_text(folder, "new")
    shutil.copytree(folder, tmp_path / ".state.replaced")
    (tmp_path / ".state.replaced" / "in use").write_text("")
    (tmp_path / ".other.tmp-staging").mkdir()
    (tmp_path / ".other.tmp-staging" / "in use").write_text("")
    atomic.recover(tmp_path)
    assert (folder / "sub" / "text").read_text() == "new"
    assert len(list(tmp_path.iterdir())) == 3
    monkeypatch.undo()
    atomic.recover(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["state"]


def versions(root: Path) -> tuple[set[str], int]:
    """The distinct versions in the folder's files, and the one in the file."""
    parts = [root / "checkpoint" / f"part-{number}" for number in range(FILES)]
    manifest = json.loads((root / "manifest.json").read_text())
    assert set(manifest["padding"]) == {manifest["version"]}
    return {word for part in parts for word in part.read_text().split()}, manifest["version"]


def test_a_kill_at_any_moment_leaves_a_whole_version(tmp_path: Path) -> None:
    publish_text(tmp_path / "checkpoint", "0")
    moments = random.Random(0)
    newest = -1
    for _ in range(KILLS):
        command = [sys.executable, "-m", "tests.state.publish_job", str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]) as job:
            assert job.stdout is not None
            assert job.stdout.readline() == "0\n"
            time.sleep(moments.random() * 0.06)
            job.kill()
        atomic.recover(tmp_path)
        folder_versions, file_version = versions(tmp_path)
        assert len(folder_versions) == 1
        folder_version = int(folder_versions.pop())
        assert folder_version - file_version in (0, 1)
        newest = max(newest, folder_version)
        assert sorted(entry.name for entry in tmp_path.iterdir()) == ["checkpoint", "manifest.json"]
    assert newest > 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is not there")
def test_a_full_disk_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    with pytest.raises(ClDistError, match=r"no space left on the disk of .*log\.jsonl.*intact.*--resume"):
        atomic.append_line(tmp_path / "log.jsonl", {"step": 1})


def test_other_errors_pass_through(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic.raising_disk_full(tmp_path):
        (tmp_path / "missing").read_text()


def can_mount() -> bool:
    """Whether this user may mount a small disk in a separate namespace."""
    command = ["unshare", "-Urm", "mount", "-t", "tmpfs", "tmpfs", "/tmp"]
    return shutil.which("unshare") is not None and subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.skipif(not can_mount(), reason="mounting a small disk in a user namespace is not allowed here")
def test_a_full_disk_leaves_the_last_state(tmp_path: Path) -> None:
    command = ["unshare", "-Urm", sys.executable, "-m", "tests.state.full_disk_job", str(tmp_path)]
    job = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    said = dict(line.split(" ", 1) for line in job.stdout.splitlines())
    assert job.returncode == 0, job.stderr
    for name in ("spans", "folder", "json", "log"):
        assert said[name].startswith("no space left on the disk of "), said[name]
    assert said["state"] == "10.0"
    assert said["manifest"] == str(["{", '"completed":', "1", "}"])
    assert said["left"] == str(["log.jsonl", "manifest.json", "state"])
