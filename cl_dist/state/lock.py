"""One run at a time in a run folder.

The kernel holds the lock and releases it when the process dies, however it dies; the file's content only says whose it
is.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from pathlib import Path
from types import TracebackType
from typing import IO

from cl_dist.errors import BadInput
from cl_dist.state.atomic import telling_full_disk

_PATIENCE_SECONDS = 0.5
"""How long to wait for a run that is just ending, or for another process that only looks (`refuse_if_locked`)."""
_POLL_SECONDS = 0.02


class RunLock:
    """Context manager that holds a run folder's lock; `BadInput` names the process that holds it already."""

    def __init__(self, path: Path) -> None:
        """`path`: the lock file, made if need be and never deleted, since another process may be waiting on it."""
        self.path = path
        self._file: IO[str] | None = None

    def __enter__(self) -> RunLock:
        """Take the lock."""
        file = self.path.open("a+", encoding="utf-8")
        try:
            _take(file, fcntl.LOCK_EX, self.path)
            with telling_full_disk(self.path):
                file.truncate(0)
                file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
                file.flush()
        except BaseException:
            file.close()
            raise
        self._file = file
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Give the lock back, also for children that inherited the open file."""
        if self._file is not None:
            fcntl.flock(self._file, fcntl.LOCK_UN)
            self._file.close()
            self._file = None


def refuse_if_locked(path: Path) -> None:
    """Raise `BadInput` where another process holds the lock; takes nothing."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        _take(file, fcntl.LOCK_SH, path)


def _take(file: IO[str], kind: int, path: Path) -> None:
    """Take a lock of `kind`; `BadInput` where another process holds it and does not let go in time."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            return fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                raise BadInput(_refusal(path)) from error
        time.sleep(_POLL_SECONDS)


def _refusal(path: Path) -> str:
    """The sentence for a folder that another run is using."""
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
        who = f"process {owner['pid']} on {owner['host']}"
    except (OSError, ValueError, KeyError, TypeError):  # it has the lock but has not written its name yet
        who = "another process"
    return f"{path.parent} is in use by {who}: wait for that run to end, stop it, or choose another output_dir"
