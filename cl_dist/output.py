"""Standard output and standard error of a command. Printing can neither end nor delay its work.

Every command prints through `direct_output`: if its output cannot be written, it exits, silently if the reader is gone
(`| head`) and with a message otherwise (a full disk). A command that does work, such as hours of training, prints
through `steady_output`: one thread per stream writes, and printing neither raises nor blocks, whatever happens to the
terminal, the pipe or the disk. Lost output is counted and reported on the other stream.
"""

from __future__ import annotations

import errno
import io
import os
import select
import shutil
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

from cl_dist.errors import ClDistError

BUFFER_BYTES = 1 << 20
"""Size of the buffer for a slow or stopped reader; what does not fit is lost."""
PATIENCE_SECONDS = 5.0
"""At the end, how long to wait for the reader to take the next piece before the rest is dropped."""
HASTE_SECONDS = 0.5
"""The same on a rank: launchers kill ranks that do not end soon after the first one."""
PAUSE_SECONDS = 0.2
"""A reader that takes nothing for this long while the buffer is full has stopped reading."""
PIECE_BYTES = 4096
"""Size of one write; a reader that takes a piece is alive."""
NO_READER = 128 + 13
"""Exit code of a command whose reader is gone, as if SIGPIPE had ended it, like other programs."""
_GONE = (errno.EPIPE, errno.EIO, errno.ENXIO)
"""Errors of a pipe without a reader and of a closed terminal."""


class OutputLost(ClDistError):
    """Standard output, the only purpose of the command, cannot be written."""

    def __init__(self, error: OSError) -> None:
        gone = error.errno in _GONE
        super().__init__("" if gone else f"standard output cannot be written: {error.strerror}")
        self.exit_code = NO_READER if gone else 1


class _Raw(io.RawIOBase):
    """A file descriptor that stays open when this object is closed."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def close(self) -> None:
        """Do nothing: a library may still hold the descriptor."""


class _Direct(_Raw):
    """Writes at once. The first failure raises OutputLost if `raises` is set; after it, all output is discarded."""

    def __init__(self, descriptor: int, raises: bool) -> None:
        super().__init__(descriptor)
        self._raises, self._failed = raises, False

    def write(self, data: object) -> int:
        content = bytes(cast(bytes, data))
        if not self._failed:
            try:
                _write_all(self._descriptor, content)
            except OSError as error:
                self._failed = True
                if self._raises:
                    raise OutputLost(error) from error
        return len(content)


class Outlet(_Raw):
    """Writes in a thread: `write` never raises, and does not wait for a reader that has stopped; `drain` waits."""

    def __init__(self, descriptor: int, name: str, patience: float = PATIENCE_SECONDS) -> None:
        super().__init__(descriptor)
        self.name, self.patience = name, patience
        self.other: Outlet | None = None
        """The outlet that reports what was lost here."""
        self.lost_bytes = 0
        self.inside_a_line = False
        """Whether the last line is unfinished."""
        self.reason = ""
        """Why the first bytes were lost."""
        self._process = os.getpid()
        self._pieces: deque[bytes] = deque()
        self._size = self._taken = self._gap = 0
        """Bytes in the buffer, bytes written or dropped, and bytes lost since the last one that was kept."""
        self._stopped_at = -1
        """The value of `_taken` when the reader was last found to have stopped."""
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def write(self, data: object) -> int:
        """Hand the bytes to the thread; returns their number."""
        content = bytes(cast(bytes, data))
        if os.getpid() != self._process:  # a fork does not have the thread
            with suppress(OSError):
                _write_all(self._descriptor, content)
            return len(content)
        with self._changed:
            # Lost bytes are counted in `_gap`; a note in their place precedes the next bytes that are kept.
            if not self._has_room(len(content)):
                self._gap += len(content)
                self._lose(len(content), "its reader has stopped reading")
            else:
                self._keep(content)
        self._report_loss()
        return len(content)

    def _has_room(self, number: int) -> bool:
        """Whether the buffer has room for `number` bytes. Waits for a live reader, but only once for a stopped one."""
        # `_taken` grows while the reader is alive. One that has stopped is not waited for again until it takes more.
        while self._size + number > BUFFER_BYTES and self._size and self._taken != self._stopped_at:
            taken = self._taken
            self._changed.wait(PAUSE_SECONDS)
            if self._taken == taken:
                self._stopped_at = taken
        return self._size + number <= BUFFER_BYTES or not self._size  # an empty buffer takes a write of any size

    def drain(self) -> None:
        """Wait until everything is written, or until nothing has been written for `patience` seconds."""
        with self._changed:
            while self._size and os.getpid() == self._process:
                taken, until = self._taken, time.monotonic() + self.patience
                while self._size and taken == self._taken and time.monotonic() < until:
                    self._changed.wait(until - time.monotonic())
                if taken == self._taken and self._size:
                    self._lose(self._size, "its reader has stopped reading")
                    self._pieces.clear()
                    self._size = 0
        self._report_loss()

    def _keep(self, content: bytes) -> None:
        if self._gap:
            content = f"\n[cl-dist: {self._gap} bytes were lost here]\n".encode() + content
            self._gap = 0
        self._pieces.extend(content[at : at + PIECE_BYTES] for at in range(0, len(content), PIECE_BYTES))
        self._size += len(content)
        self.inside_a_line = not content.endswith(b"\n")
        if self._thread is None:
            self._thread = threading.Thread(target=self._write_pieces, name=f"{self.name} writer", daemon=True)
            self._thread.start()
        self._changed.notify_all()

    def _write_pieces(self) -> None:
        """What the thread does."""
        while True:
            with self._changed:
                while not self._pieces:
                    self._changed.wait()
                piece = self._pieces.popleft()
            # Written without the lock, so that `write` never waits for the reader.
            problem = None
            try:
                _write_all(self._descriptor, piece)
            except OSError as error:
                problem = error
            with self._changed:
                self._taken += len(piece)
                self._size = max(0, self._size - len(piece))
                if problem is not None:
                    gone = problem.errno in _GONE
                    self._lose(len(piece), "its reader is gone" if gone else f"write failed: {problem.strerror}")
                self._changed.notify_all()
            self._report_loss()

    def _lose(self, number: int, reason: str) -> None:
        self.reason = self.reason or reason
        self.lost_bytes += number

    def _report_loss(self) -> None:
        """Report lost output on the other stream, once; call without the lock, since the other may report here."""
        if self.reason and self.other is not None:
            other, self.other = self.other, None
            begin = "\n" if other.inside_a_line else ""
            other.write(
                f"{begin}cl-dist: note: {self.name} is lost: {self.reason}; the command keeps running\n".encode()
            )


def _write_all(descriptor: int, content: bytes) -> None:
    """Write all bytes, even if another process has made the descriptor non-blocking (a shell may share it)."""
    while content:
        try:
            content = content[os.write(descriptor, content) :]
        except BlockingIOError:
            poll = select.poll()
            poll.register(descriptor, select.POLLOUT)
            poll.poll()


_outlets: list[Outlet] = []
"""This process's outlets, inside `steady_output`."""


@contextmanager
def direct_output() -> Iterator[None]:
    """Context in which writing to standard output raises OutputLost once if it fails, and standard error never raises.

    Characters that the encoding lacks are written as escapes.
    """
    before = (sys.stdout, sys.stderr)
    output, errors = map(_descriptor, before)
    # A stream without a descriptor, such as a test's StringIO, stays as it is.
    if output is not None:
        buffer = io.BufferedWriter(_Direct(output, raises=True))
        sys.stdout = _text(buffer, sys.stdout, line_buffering=os.isatty(output))
    if errors is not None:
        sys.stderr = _text(_Direct(errors, raises=False), sys.stderr, line_buffering=True)
    try:
        yield
    finally:
        with suppress(OutputLost):
            sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


@contextmanager
def steady_output(patience: float = PATIENCE_SECONDS) -> Iterator[None]:
    """Context in which printing neither raises nor blocks; at its end, the reader gets `patience` seconds for each
    remaining piece.

    Nested inside another `steady_output` it does nothing.
    """
    before = (sys.stdout, sys.stderr)
    descriptors = tuple(map(_descriptor, before))
    if _outlets or None in descriptors:
        yield
        return
    output = Outlet(cast(int, descriptors[0]), "standard output", patience)
    # If both streams go to one file, one thread writes both, which preserves their order.
    errors = (
        output
        if _same_file(*cast("tuple[int, int]", descriptors))
        else Outlet(cast(int, descriptors[1]), "standard error", patience)
    )
    if errors is not output:
        output.other, errors.other = errors, output
    _outlets[:] = dict.fromkeys([output, errors])
    with suppress(OutputLost):
        sys.stdout.flush()
    sys.stdout, sys.stderr = (_text(outlet, stream, line_buffering=True)
                              for outlet, stream in zip((output, errors), before, strict=True))  # fmt: skip
    try:
        yield
    finally:
        drain_output()
        sys.stdout, sys.stderr = before
        _outlets.clear()


def drain_output() -> None:
    """Wait until all output is written, or its reader has been idle for too long."""
    for stream in (sys.stdout, sys.stderr) if _outlets else ():
        stream.flush()  # unfinished lines
    for outlet in _outlets:
        outlet.drain()


def lost_output() -> list[str]:
    """A sentence about each of this process's streams that lost output."""
    return [
        f"{outlet.lost_bytes} bytes of {outlet.name} were lost: {outlet.reason}"
        for outlet in _outlets
        if outlet.lost_bytes
    ]


def pass_on(data: bytes, stream: TextIO) -> None:
    """Print the bytes that another process has printed, unchanged."""
    buffer = getattr(stream, "buffer", None)
    if buffer is None:
        stream.write(data.decode(errors="replace"))
    else:
        buffer.write(data)
        buffer.flush()


def terminal_columns() -> int | None:
    """How wide the terminal is that shows standard output; None if it goes elsewhere, where lines may be long."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def fill_missing_descriptors() -> None:
    """Open the null device in place of missing standard streams (`>&-`), before another file gets their descriptor."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free descriptor
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            stream = open(descriptor, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 - for the whole process
            setattr(sys, name, stream)


def same_stream() -> bool:
    """Whether standard output and standard error go to the same file, pipe or terminal."""
    output, errors = _descriptor(sys.stdout), _descriptor(sys.stderr)
    return output is not None and errors is not None and _same_file(output, errors)


def _same_file(one: int, other: int) -> bool:
    first, second = os.fstat(one), os.fstat(other)
    return (first.st_dev, first.st_ino) == (second.st_dev, second.st_ino)


def _descriptor(stream: TextIO | None) -> int | None:
    """The open file descriptor that a stream writes to; None if it writes to none."""
    try:
        descriptor = stream.fileno() if stream is not None else None
        if descriptor is not None:
            os.fstat(descriptor)
    except (OSError, ValueError):  # not a file, or closed
        return None
    return descriptor


def _text(buffer: Any, like: TextIO, line_buffering: bool) -> io.TextIOWrapper:
    """A text stream that writes whole lines, so that the lines of several processes on one terminal do not mix."""
    return io.TextIOWrapper(
        buffer,
        encoding=like.encoding or "utf-8",
        errors="backslashreplace",
        newline="\n",
        line_buffering=line_buffering,
    )
