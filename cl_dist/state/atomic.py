"""Files and folders that are replaced as a whole: a kill at any moment leaves the old version or the new one.

A file is written under a temporary name in the same folder, flushed to disk and renamed. A folder is filled in a
staging folder next to its final path and swapped in by two renames; `recover` repairs a swap that was interrupted
between them. Temporary names start with a dot and end in `.tmp-…` or `.replaced`, so no task name can collide with one.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cl_dist.errors import ClDistError
from cl_dist.heartbeat import beat

FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
"""Error numbers of a full disk or an exhausted quota."""


class DiskFull(ClDistError):
    """The disk is full, or the user's quota is used up.

    Args:
        path: What could not be written.
        advice: What is still intact and what to do; the default is for a run.
    """

    def __init__(
        self,
        path: Path,
        advice: str = "nothing was replaced and the last complete state there is intact; free some space and continue "
        "with --resume",
    ) -> None:
        self.path, self.advice = path, advice
        super().__init__(f"no space left on the disk of {path}: {advice}")

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle with both arguments: ranks send each other this error."""
        return DiskFull, (self.path, self.advice)


@contextmanager
def advising(advice: str) -> Iterator[None]:
    """Give `DiskFull` errors inside the block another advice, for commands without --resume."""
    try:
        yield
    except DiskFull as error:
        raise DiskFull(error.path, f"nothing was replaced; {advice}") from error


@contextmanager
def raising_disk_full(path: Path) -> Iterator[None]:
    """Turn full-disk errors inside the block into a `DiskFull` that names `path`."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError):
            is_full = error.errno in FULL_DISK
        else:
            # safetensors and tokenizers are written in Rust, and mention the error number only in their message.
            is_full = any(f"(os error {number})" in str(error) for number in FULL_DISK)
        if not is_full:
            raise
        raise DiskFull(path) from error


def sync(path: Path) -> None:
    """Flush a file's bytes, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    beat()


def make_folder(path: Path) -> None:
    """Make a folder and its missing parents, durably: a power loss cannot remove them together with their contents."""
    if path.is_dir():
        return
    try:
        path.mkdir(exist_ok=True)
    except FileNotFoundError:
        if path.parent == path:
            raise
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
    with suppress(PermissionError):  # a folder that is writable but not readable cannot be opened
        sync(path.parent)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Replace the file `path` atomically and durably; yields a temporary path for the new version.

    On an error nothing is replaced. Raises `DiskFull` if the disk is full.
    """
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    with raising_disk_full(path):
        try:
            yield temporary
            sync(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        sync(path.parent)


def write_bytes(path: Path, content: bytes) -> None:
    """Replace the content of `path`, atomically and durably."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Replace the content of `path` with `text` in UTF-8, atomically and durably."""
    write_bytes(path, text.encode())


def finite(value: Any) -> Any:
    """Replace NaN and infinity in a JSON value with None: JSON has no such numbers, and other programs reject them."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return value


def write_json(path: Path, value: Any) -> None:
    """Replace the content of `path` with indented JSON, atomically and durably; NaN and infinity become null."""
    write_text(path, json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def append_line(path: Path, value: Any) -> None:
    """Append `value` to `path` as one line of JSON, after ending a line that a kill may have cut off."""
    LineFile(path).append(value)


class LineFile:
    """A file of JSON lines that stays open: a line takes two system calls, and opens nothing.

    Another process may rename or delete the file (log rotation), truncate it, or append to it: each line goes to the
    file that has the name at that moment, and begins a line of its own.

    Args:
        path: The file. It is opened, and created if needed, when the first line is written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None
        self._identity: tuple[int, int] | None = None
        """Device and inode of the open file."""
        self._end = 0
        """Size of the file after the last complete line."""

    def append(self, value: Any) -> None:
        """Append `value` as one line. Raises `DiskFull` if the disk is full, and other OSErrors."""
        line = json.dumps(finite(value), ensure_ascii=False, allow_nan=False).encode() + b"\n"
        with raising_disk_full(self._path):
            descriptor, size = self._current()
            # Unless the file is as this process has left it, its last line may be cut off.
            if size not in (0, self._end) and os.pread(descriptor, 1, size - 1) != b"\n":
                line = b"\n" + line
            written = 0
            while written < len(line):  # a disk that fills up takes a part of it first
                written += os.write(descriptor, line[written:])
            self._end = size + written

    def _current(self) -> tuple[int, int]:
        """Descriptor and size of the file that has the name now."""
        try:
            found = os.stat(self._path)
        except FileNotFoundError:
            found = None
        if self._descriptor is None or found is None or (found.st_dev, found.st_ino) != self._identity:
            self.close()
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
            self._close = weakref.finalize(self, os.close, self._descriptor)
            found, self._end = os.fstat(self._descriptor), 0
            self._identity = (found.st_dev, found.st_ino)
        return self._descriptor, found.st_size

    def close(self) -> None:
        """Close the file; the next line opens it again."""
        if self._descriptor is not None:
            self._close()
            self._descriptor = None


def staging(folder: Path) -> Path:
    """Where the next version of `folder` is assembled; the same path on every rank."""
    return folder.with_name(f".{folder.name}.tmp-staging")


def _discard(folder: Path) -> None:
    """Free a folder's name, and delete as much of the folder as the system allows; `recover` deletes the rest later.

    On NFS, a file that a process still reads stays behind as `.nfs…`, and so does its folder. That does no harm as long
    as the name is free. Raises OSError if the folder cannot be renamed.
    """
    name = f".{folder.name.removeprefix('.')}.tmp-discarded-{os.getpid()}-{time.monotonic_ns()}"
    discarded = folder.with_name(name)
    os.rename(folder, discarded)
    shutil.rmtree(discarded, ignore_errors=True)


def stage(folder: Path) -> Path:
    """Make an empty staging folder for `folder` and return it. One rank calls this before all ranks write there."""
    temporary = staging(folder)
    if temporary.exists():
        _discard(temporary)
    with raising_disk_full(folder):
        make_folder(folder.parent)
        temporary.mkdir()
    return temporary


def publish(folder: Path, synced: bool = False) -> None:
    """Replace `folder` with its staging folder. One rank calls this after all ranks have written.

    Args:
        folder: The final path.
        synced: Whether the staging folder and all its files are on disk already. Otherwise this process flushes them,
            one after the other.
    """
    temporary, replaced = staging(folder), folder.with_name(f".{folder.name}.replaced")
    with raising_disk_full(folder):
        # Everything is on disk before the first rename.
        if not synced:
            _sync_tree(temporary)
        # Move the old version aside. The name may be taken, if an older version could not be deleted last time.
        if replaced.exists():
            _discard(replaced)
        if folder.exists():
            os.rename(folder, replaced)
        os.rename(temporary, folder)
        sync(folder.parent)
    # Only now delete the old version. If that fails, the new one is in place all the same.
    if replaced.exists():
        with suppress(OSError):
            _discard(replaced)


def _sync_tree(folder: Path) -> None:
    """Flush a folder and everything in it to disk."""
    for place, _, names in os.walk(folder):
        for name in names:
            sync(Path(place, name))
        sync(Path(place))


@contextmanager
def publishing(folder: Path) -> Iterator[Path]:
    """`stage` and `publish` for a single process; yields the folder to write to. On an error nothing is replaced."""
    temporary = stage(folder)
    try:
        with raising_disk_full(folder):
            yield temporary
        publish(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def recover(root: Path) -> None:
    """Clean up after killed writes anywhere below `root`: finish or revert swaps, delete temporary files and folders.

    What cannot be deleted now (a file on NFS that is still open) is left for the next call and does no harm. Call this
    only while holding the run's lock, because it also deletes the unfinished files of other writers.
    """
    for replaced in list(root.rglob(".*.replaced")):
        folder = replaced.with_name(replaced.name.removeprefix(".").removesuffix(".replaced"))
        if folder.exists():
            _discard(replaced)
        else:
            os.rename(replaced, folder)
    for leftover in list(root.rglob(".*.tmp-*")):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            with suppress(OSError):
                leftover.unlink()
