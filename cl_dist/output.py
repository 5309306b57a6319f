"""Standard output and standard error of a command, so that nothing that is printed can end or delay its work.

Every command prints through `direct_output`: what cannot be written ends it quietly where nobody reads it (`| head`),
and with a sentence otherwise (a full disk). A command that works, trains for hours say, prints through `steady_output`:
a thread per stream writes, and printing neither raises nor waits, whatever became of terminal, pipe or disk. What is
lost is counted and reported on the other stream.
"""

from __future__ import annotations

import errno
import io
import os
import select
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

from cl_dist.errors import ClDistError

BUFFER_BYTES = 1 << 20
"""What is kept for a reader that is slow or has stopped; anything beyond it is lost."""
PATIENCE_SECONDS = 5.0
"""At the end, how long a reader may take for the next piece before the rest is dropped."""
HASTE_SECONDS = 0.5
"""The same for a rank: launchers kill ranks that do not end soon after the first one has."""
PAUSE_SECONDS = 0.2
"""A reader that takes nothing for this long while the buffer is full has stopped reading."""
PIECE_BYTES = 4096
"""What is written at once; a reader that takes a piece is alive."""
NOBODY_READS = 128 + 13
"""Exit code of a command whose reader has left: as if SIGPIPE had ended it, as with other programs."""
_GONE = (errno.EPIPE, errno.EIO, errno.ENXIO)
"""What the system says of a pipe without a reader, and of a terminal that was closed."""


class OutputLost(ClDistError):
    """Standard output cannot be written, and was all that the command was for."""

    def __init__(self, error: OSError) -> None:
        gone = error.errno in _GONE
        super().__init__("" if gone else f"standard output cannot be written: {error.strerror}")
        self.exit_code = NOBODY_READS if gone else 1


class _Raw(io.RawIOBase):
    """A descriptor that stays open, whatever becomes of this object."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def close(self) -> None:
        """Nothing: a library may have kept it."""


class _Direct(_Raw):
    """Written at once. The first failure raises OutputLost where `raises`; after it everything is thrown away."""

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
    """Written by a thread: `write` does not wait for a reader that has stopped, and never raises; `drain` waits."""

    def __init__(self, descriptor: int, name: str, patience: float = PATIENCE_SECONDS) -> None:
        super().__init__(descriptor)
        self.name, self.patience = name, patience
        self.other: Outlet | None = None
        """Where it is said that something was lost here."""
        self.lost_bytes = 0
        self.inside_a_line = False
        """Whether the next bytes do not begin a line."""
        self.reason = ""
        """Why the first of them were lost."""
        self._process = os.getpid()
        self._pieces: deque[bytes] = deque()
        self._size = self._taken = self._gap = 0
        """Bytes that wait, bytes that were written or given up, and bytes that were lost since the last one kept."""
        self._stopped_at = -1
        """What `_taken` was when the reader was found to have stopped reading."""
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def write(self, data: object) -> int:
        """Leave it to the thread; returns the number of bytes."""
        content = bytes(cast(bytes, data))
        if os.getpid() != self._process:  # a fork, which does not have the thread
            with suppress(OSError):
                _write_all(self._descriptor, content)
            return len(content)
        with self._changed:
            if not self._has_room(len(content)):
                self._gap += len(content)
                self._lose(len(content), "its reader has stopped reading")
            else:
                self._keep(content)
        self._say_what_is_lost()
        return len(content)

    def _has_room(self, number: int) -> bool:
        """Whether `number` bytes can be kept. Waits for a reader that is alive; for one that has stopped, only once."""
        while self._size + number > BUFFER_BYTES and self._size and self._taken != self._stopped_at:
            taken = self._taken
            self._changed.wait(PAUSE_SECONDS)
            if self._taken == taken:
                self._stopped_at = taken
        return self._size + number <= BUFFER_BYTES or not self._size

    def drain(self) -> None:
        """Wait until all is written, or nothing more has been for `patience` seconds."""
        with self._changed:
            while self._size and os.getpid() == self._process:
                taken, until = self._taken, time.monotonic() + self.patience
                while self._size and taken == self._taken and time.monotonic() < until:
                    self._changed.wait(until - time.monotonic())
                if taken == self._taken:
                    self._give_up()
        self._say_what_is_lost()

    def _give_up(self) -> None:
        if self._size:
            self._lose(self._size, "its reader has stopped reading")
            self._pieces.clear()
            self._size = 0

    def _keep(self, content: bytes) -> None:
        if self._gap:
            content = f"\n[cl-dist: {self._gap} bytes were lost here]\n".encode() + content
            self._gap = 0
        self._pieces.extend(content[at : at + PIECE_BYTES] for at in range(0, len(content), PIECE_BYTES))
        self._size += len(content)
        self.inside_a_line = not content.endswith(b"\n")
        if self._thread is None:
            self._thread = threading.Thread(target=self._write_on, name=f"{self.name} writer", daemon=True)
            self._thread.start()
        self._changed.notify_all()

    def _write_on(self) -> None:
        while True:
            with self._changed:
                while not self._pieces:
                    self._changed.wait()
                piece = self._pieces.popleft()
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
                    self._lose(len(piece), "nobody reads it" if gone else f"it cannot be written: {problem.strerror}")
                self._changed.notify_all()
            self._say_what_is_lost()

    def _lose(self, number: int, reason: str) -> None:
        self.reason = self.reason or reason
        self.lost_bytes += number

    def _say_what_is_lost(self) -> None:
        """Once, on the other stream; not under this one's lock, since the other one may want to say the same here."""
        if self.reason and self.other is not None:
            other, self.other = self.other, None
            begin = "\n" if other.inside_a_line else ""
            other.write(f"{begin}cl-dist: note: {self.name} is lost: {self.reason}; the work goes on\n".encode())


def _write_all(descriptor: int, content: bytes) -> None:
    """Write it, also where somebody else has made the descriptor non-blocking (it may be shared with a shell)."""
    while content:
        try:
            content = content[os.write(descriptor, content) :]
        except BlockingIOError:
            poll = select.poll()
            poll.register(descriptor, select.POLLOUT)
            poll.poll()


_outlets: list[Outlet] = []
"""Of this process, while `steady_output` is in force."""


@contextmanager
def direct_output() -> Iterator[None]:
    """While this lasts standard output raises OutputLost where it cannot be written, once, and standard error nothing.

    No text fails for its characters: what the encoding lacks is written as an escape.
    """
    before = (sys.stdout, sys.stderr)
    output, errors = map(_descriptor, before)
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
    """While this lasts printing neither raises nor waits; at the end a reader may take `patience` seconds for the next
    piece of what is left.

    Inside of another one it does nothing.
    """
    before = (sys.stdout, sys.stderr)
    descriptors = tuple(map(_descriptor, before))
    if _outlets or None in descriptors:
        yield
        return
    output = Outlet(cast(int, descriptors[0]), "standard output", patience)
    # Into one file both go by one thread, which keeps their order.
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
    """Wait until everything printed is written, or its reader has been idle for too long."""
    for stream in (sys.stdout, sys.stderr) if _outlets else ():
        stream.flush()  # the beginning of a line
    for outlet in _outlets:
        outlet.drain()


def lost_output() -> list[str]:
    """A sentence per stream about what was lost of this process's output; none where nothing was."""
    return [
        f"{outlet.lost_bytes} bytes of {outlet.name} were lost: {outlet.reason}"
        for outlet in _outlets
        if outlet.lost_bytes
    ]


def pass_on(data: bytes, stream: TextIO) -> None:
    """Print what another process has printed, as it is."""
    buffer = getattr(stream, "buffer", None)
    if buffer is None:
        stream.write(data.decode(errors="replace"))
    else:
        buffer.write(data)
        buffer.flush()


def fill_missing_descriptors() -> None:
    """Let the null device be what this process was started without (`>&-`), before something else takes its number."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            stream = open(descriptor, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 - for the whole process
            setattr(sys, name, stream)


def same_stream() -> bool:
    """Whether standard output and standard error go to one and the same place."""
    output, errors = _descriptor(sys.stdout), _descriptor(sys.stderr)
    return output is not None and errors is not None and _same_file(output, errors)


def _same_file(one: int, other: int) -> bool:
    first, second = os.fstat(one), os.fstat(other)
    return (first.st_dev, first.st_ino) == (second.st_dev, second.st_ino)


def _descriptor(stream: TextIO | None) -> int | None:
    """The open file descriptor that a stream writes to; None where it writes somewhere else."""
    try:
        descriptor = stream.fileno() if stream is not None else None
        if descriptor is not None:
            os.fstat(descriptor)
    except (OSError, ValueError):  # no file, or closed
        return None
    return descriptor


def _text(buffer: Any, like: TextIO, line_buffering: bool) -> io.TextIOWrapper:
    """A line goes out in one piece, so that those of several processes on one terminal do not run into each other."""
    return io.TextIOWrapper(
        buffer,
        encoding=like.encoding or "utf-8",
        errors="backslashreplace",
        newline="\n",
        line_buffering=line_buffering,
    )
