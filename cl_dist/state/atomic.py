"""Files and folders that are replaced as a whole: a kill at any moment leaves the old version or the new one.

A file is written under a temporary name in the same folder, forced to the disk and renamed. A folder is filled in a
staging folder beside its final place and swapped in by two renames; `recover` undoes a swap that was cut off between
them. Temporary names start with a dot and end in `.tmp-…` or `.replaced`, so that no task can be named like one.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cl_dist.errors import ClDistError
from cl_dist.heartbeat import beat

FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
"""Error numbers of a disk, or a quota, that has no room."""


class DiskFull(ClDistError):
    """A disk, or the user's quota, has no room.

    Args:
        path: What could not be written.
        advice: What became of the rest and what to do; by default what helps a run.
    """

    def __init__(
        self,
        path: Path,
        advice: str = "nothing was replaced and the last complete state there is intact; free some space and go on "
        "with --resume",
    ) -> None:
        self.path, self.advice = path, advice
        super().__init__(f"no space left on the disk of {path}: {advice}")

    def __reduce__(self) -> tuple[Any, ...]:
        """It goes from rank to rank as it is."""
        return DiskFull, (self.path, self.advice)


@contextmanager
def advising(advice: str) -> Iterator[None]:
    """For commands without --resume: inside, a full disk is reported with this advice."""
    try:
        yield
    except DiskFull as error:
        raise DiskFull(error.path, f"nothing was replaced; {advice}") from error


@contextmanager
def telling_full_disk(path: Path) -> Iterator[None]:
    """Turn full-disk errors inside the block into a `DiskFull` that names `path`."""
    try:
        yield
    except Exception as error:
        if not _is_disk_full(error):
            raise
        raise DiskFull(path) from error


def _is_disk_full(error: Exception) -> bool:
    """Whether an error says that the disk, or the user's quota, is full."""
    if isinstance(error, OSError):
        return error.errno in FULL_DISK
    # safetensors and tokenizers, written in Rust, only give the operating system's number in their text.
    return any(f"(os error {number})" in str(error) for number in FULL_DISK)


def sync(path: Path) -> None:
    """Force a file's bytes, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    beat()


def make_folder(path: Path) -> None:
    """Make a folder, and those above it that are missing, durably: a power loss takes away none with what is in it."""
    if path.is_dir():
        return
    try:
        path.mkdir(exist_ok=True)
    except FileNotFoundError:
        if path.parent == path:
            raise
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
    with suppress(PermissionError):  # a folder that may be written to but not listed can't be opened
        sync(path.parent)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Replace the file `path` atomically and durably: yields a temporary path to write its new version to.

    On an error nothing is replaced. Raises `DiskFull` where the disk is full.
    """
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    with telling_full_disk(path):
        try:
            yield temporary
            sync(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        sync(path.parent)


def write_bytes(path: Path, content: bytes) -> None:
    """Replace the file `path` by `content`, as `replacing` does."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Replace the file `path` by `text` (UTF-8), as `write_bytes` does."""
    write_bytes(path, text.encode())


def finite(value: Any) -> Any:
    """A JSON value with NaN and infinity replaced by None: JSON has no such numbers, and other programs refuse them."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return value


def write_json(path: Path, value: Any) -> None:
    """Replace the file `path` by `value` as indented JSON, as `write_text` does; NaN and infinity become null."""
    write_text(path, json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def append_line(path: Path, value: Any) -> None:
    """Append `value` to `path` as one line of JSON; a line that a kill cut off is closed first, and harms no other."""
    line = json.dumps(finite(value), ensure_ascii=False, allow_nan=False).encode() + b"\n"
    with telling_full_disk(path), path.open("ab") as file:
        file.write(line if _ends_with_newline(path) else b"\n" + line)


def _ends_with_newline(path: Path) -> bool:
    """Whether a file is empty or its last byte ends a line."""
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return True
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def staging(folder: Path) -> Path:
    """Where the next version of `folder` is put together; the same for every rank."""
    return folder.with_name(f".{folder.name}.tmp-staging")


def _replaced(folder: Path) -> Path:
    """Where the old version of `folder` waits until the new one is in place."""
    return folder.with_name(f".{folder.name}.replaced")


def _discard(folder: Path) -> None:
    """Free a folder's name, and delete as much of it as the system allows; `recover` deletes the rest another time.

    On NFS a file that somebody still reads stays behind as `.nfs…`, and with it the folder. Nothing depends on its
    being deleted, but on its name: raises OSError where that cannot be freed.
    """
    name = f".{folder.name.removeprefix('.')}.tmp-discarded-{os.getpid()}-{time.monotonic_ns()}"
    discarded = folder.with_name(name)
    os.rename(folder, discarded)
    shutil.rmtree(discarded, ignore_errors=True)


def stage(folder: Path) -> Path:
    """Make an empty staging folder for `folder` and return it (one rank does this before all of them write there)."""
    temporary = staging(folder)
    if temporary.exists():
        _discard(temporary)
    with telling_full_disk(folder):
        make_folder(folder.parent)
        temporary.mkdir()
    return temporary


def publish(folder: Path) -> None:
    """Put the staging folder in the place of `folder` (one rank does this after all of them have written).

    Everything is on the disk before the first rename. An older version is moved aside, and deleted last.
    """
    temporary, replaced = staging(folder), _replaced(folder)
    with telling_full_disk(folder):
        _sync_tree(temporary)
        if replaced.exists():  # it could not be discarded the last time
            _discard(replaced)
        if folder.exists():
            os.rename(folder, replaced)
        os.rename(temporary, folder)
        sync(folder.parent)
    if replaced.exists():
        with suppress(OSError):  # the new version is in its place
            _discard(replaced)


def _sync_tree(folder: Path) -> None:
    """Force a folder with everything in it to the disk."""
    for place, _, names in os.walk(folder):
        for name in names:
            sync(Path(place, name))
        sync(Path(place))


@contextmanager
def publishing(folder: Path) -> Iterator[Path]:
    """`stage` and `publish` for a single process: yields the folder to write in; on an error nothing is replaced."""
    temporary = stage(folder)
    try:
        with telling_full_disk(folder):
            yield temporary
        publish(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def recover(root: Path) -> None:
    """Undo what killed writes left anywhere below `root`: finish or revert swaps, delete temporary files and folders.

    What cannot be deleted now (a file that somebody reads on NFS) stays for the next time; nothing depends on it.
    Only for the holder of the run's lock: another writer's unfinished files would go too.
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
