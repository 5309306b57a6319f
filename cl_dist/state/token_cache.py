"""Tokenised data in files: the ranks of a machine share one copy in memory, and later runs do not tokenise again.

A file holds one split of one task, in safetensors format, and is named after a digest of everything that decides its
content (`TokenisedData`). So an entry is never stale, only unused, and may be deleted at any time. Ranks map the file:
pages that they read are in memory once per machine, and the system can drop them.

The first rank that needs an entry tokenises and writes it while the others wait. They wait for a lock that the kernel
releases if that rank dies, in whatever way, so the next one takes over. Nothing here can end a run: where files do not
work, a rank keeps its own arrays and says so.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import logging
import mmap
import os
import time
import weakref
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import IO, Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from cl_dist.errors import ClDistError
from cl_dist.heartbeat import beat, last_beat, opaque
from cl_dist.state.atomic import DiskFull, make_folder, replacing
from cl_dist.tasks.samples import Integers, Table, pack
from cl_dist.tasks.types import Encoded

FORMAT = "1"
_CHUNK_BYTES = 1 << 20
_LONGEST_HEADER = 1 << 20
_DTYPES = {"U16": np.uint16, "U32": np.uint32, "I32": np.int32, "I64": np.int64}
"""Safetensors' names of the dtypes in a `Table`."""
_COLUMNS = tuple(field.name for field in fields(Table))
_POLL_SECONDS = 0.1
_SIGN_SECONDS = 1.0
"""How often the rank that tokenises shows that it is alive."""
_STALLED_SECONDS = 300.0
"""A rank stops waiting for one that has shown no sign of life for this long."""
_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_LIBC.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_MAP_FAILED = ctypes.c_void_p(-1).value

Encode = Callable[[], Iterator[Encoded]]

logger = logging.getLogger(__name__)


class _Damaged(Exception):
    """A file is not what was written; the message says why."""


class TokenCache:
    """Keeps tables in files; a `cl_dist.tasks.tokenised.Keep`.

    Args:
        folder: Where the files are; created if necessary.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._said: set[str] = set()

    def __call__(self, key: str | None, encode: Encode) -> Table:
        """The table that `key` identifies: from its file, or encoded now and written to it."""
        if key is None:
            self._say("this tokenizer runs code or data that cannot be compared between runs")
            return pack(encode())
        path = self.folder / f"{key}.safetensors"
        try:
            if (found := self._read(path)) is not None:
                return found
            make_folder(self.folder)
            # Entries share a few locks: files of locks must stay, since another rank may be waiting for one.
            lock = (self.folder / f".lock-{key[:2]}").open("ab")
        except OSError as error:
            self._say(f"{self.folder}: {error.strerror or error}")
            return pack(encode())
        with lock, self._turn(lock) as mine:
            return self._encode(path, encode, lock) if mine else pack(encode())

    def _encode(self, path: Path, encode: Encode, lock: IO[bytes]) -> Table:
        """Encode and write an entry, unless another rank has just done so; called with the lock."""
        try:
            if (found := self._read(path)) is not None:
                return found
            for leftover in path.parent.glob(f".{path.name}.tmp-*"):  # of a rank that was killed while it wrote
                leftover.unlink(missing_ok=True)
        except OSError as error:
            self._say(f"{self.folder}: {error.strerror or error}")
        table = pack(encode(), _signs_of_life(lock))
        try:
            _write(path, table)
            return self._read(path) or table
        except (OSError, ClDistError, SafetensorError) as error:
            full = "no space left on its disk" if isinstance(error, DiskFull) else error
            self._say(f"{self.folder}: {error.strerror if isinstance(error, OSError) else full}")
            return table

    def _read(self, path: Path) -> Table | None:
        """The table of an intact file; None if there is none. Raises OSError if it cannot be read."""
        try:
            return _mapped(path)
        except FileNotFoundError:
            return None
        except _Damaged as damage:
            logger.warning("%s is damaged (%s): it is written again", path, damage)
            return None

    @contextmanager
    def _turn(self, lock: IO[bytes]) -> Iterator[bool]:
        """Wait for the lock and hold it; yields False without it, if there are no locks or its holder is stuck."""
        signs, since, phase = -1, time.monotonic(), last_beat().phase
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                # Only the holder's progress counts as progress here, or a job that hangs would never be found out.
                seen = os.fstat(lock.fileno()).st_mtime_ns
                if seen != signs:
                    signs, since = seen, time.monotonic()
                    beat("waiting for another process to tokenise the data")
                if time.monotonic() - since > _STALLED_SECONDS:
                    self._say(f"{self.folder}: the process that tokenises makes no progress")
                    beat(phase)
                    yield False
                    return
                time.sleep(_POLL_SECONDS)
            except OSError as error:
                self._say(f"{self.folder}: its file system has no locks ({error.strerror})")
                yield False
                return
        if signs != -1:
            beat(phase)  # what follows is no longer the wait
        try:
            yield True
        finally:
            with suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_UN)

    def _say(self, reason: str) -> None:
        """Report once why data is not shared."""
        if reason not in self._said:
            self._said.add(reason)
            logger.warning("tokenised data is not cached, so every rank tokenises it for itself: %s", reason)


def _signs_of_life(lock: IO[bytes]) -> Callable[[], None]:
    """Something to call while tokenising, which shows the ranks that wait for the lock that work goes on."""
    last = 0.0

    def show() -> None:
        nonlocal last
        if time.monotonic() - last > _SIGN_SECONDS:
            last = time.monotonic()
            with suppress(OSError):
                os.utime(lock.fileno())

    return show


def _write(path: Path, table: Table) -> None:
    """Write an entry, atomically and durably."""
    columns = {name: np.ascontiguousarray(getattr(table, name)) for name in _COLUMNS}
    with replacing(path) as temporary, opaque():
        save_file(columns, temporary, metadata={"format": FORMAT})
        # The checksum is of the file as it is, appended: safetensors decides the order of the columns.
        with temporary.open("r+b") as file:
            checksum = _crc(file)
            file.write(checksum.to_bytes(4, "little"))


def _crc(file: IO[bytes], size: int | None = None) -> int:
    """CRC-32 of the next `size` bytes, or of all that are left.

    They are read and not mapped, so that checking a file does not make the process larger.
    """
    crc = 0
    while size is None or size > 0:
        chunk = file.read(_CHUNK_BYTES if size is None else min(_CHUNK_BYTES, size))
        if not chunk:
            break
        crc = zlib.crc32(chunk, crc)
        size = None if size is None else size - len(chunk)
        beat()
    return crc


def _mapped(path: Path) -> Table:
    """Map a file after checking every byte of it. Raises `_Damaged`, or OSError if it cannot be read."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size - 4
        if size < 8:
            raise _Damaged("it is too short")
        if _crc(file, size) != int.from_bytes(file.read(4), "little"):
            raise _Damaged("its checksum is wrong")
        file.seek(0)
        length = int.from_bytes(file.read(8), "little")
        if length > _LONGEST_HEADER:
            raise _Damaged("its header is too long")
        header: dict[str, Any] = json.loads(file.read(length))
        data = _map(file, size)[8 + length :]
    if header["__metadata__"]["format"] != FORMAT:
        raise _Damaged("another release wrote it")
    columns = {}
    for name in _COLUMNS:
        entry = header[name]
        first, last = entry["data_offsets"]
        columns[name] = np.asarray(data[first:last]).view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return Table(**columns)


def _map(file: IO[bytes], size: int) -> Integers:
    """The first `size` bytes of a file, read-only; they stay mapped as long as an array refers to them.

    Python's own mmap keeps the file open until then, so that a stream of some hundred tasks would use up the files that
    a process may open (1024 on most systems).
    """
    address = _LIBC.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
    if address == _MAP_FAILED:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    pages = (ctypes.c_ubyte * size).from_address(address)
    weakref.finalize(pages, _LIBC.munmap, address, size).atexit = False
    data = np.frombuffer(memoryview(pages), dtype=np.uint8)
    data.flags.writeable = False
    return data
