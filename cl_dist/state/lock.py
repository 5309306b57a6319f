"""One run at a time in a run folder.

The kernel holds the lock and releases it when the process dies, however it dies; the file's content only names the
owner. If a whole machine dies, the file server releases the lock when it notices (NFS: when the client's lease ends).
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO

from cl_dist.errors import BadInput
from cl_dist.state.atomic import raising_disk_full

_PATIENCE_SECONDS = 0.5
"""How long to wait for a run that is about to end, or for a process that only checks the lock (`refuse_if_locked`)."""
_REQUEUED_PATIENCE_SECONDS = 300.0
"""How long a job that Slurm has restarted waits: if its node died, the file server takes minutes to notice."""
_NOTIFY_SECONDS = 5.0
"""After how long the user learns that the process waits, and for whom."""
_POLL_SECONDS = 0.02
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
"""Errors of file systems without locks: Lustre without the mount option `flock`, NFS without lockd."""

Notify = Callable[[str], None]
"""Shows the user one line."""


class InUse(BadInput):
    """Another process holds the lock; the message names it."""


class RunLock:
    """Context manager that holds a run folder's lock.

    Entering raises `InUse` if another process holds it, and `BadInput` if the file system has no locks.

    Args:
        path: The lock file. It is created if necessary and never deleted, since another process may be waiting for it.
        notify: Called with one line when a job that Slurm has restarted waits for the lock of its dead predecessor. If
            None, such a job does not wait.
    """

    def __init__(self, path: Path, notify: Notify | None = None) -> None:
        self.path, self._notify = path, notify
        self._file: IO[str] | None = None

    def __enter__(self) -> RunLock:
        """Take the lock."""
        file = self.path.open("a+", encoding="utf-8")
        try:
            _take(file, fcntl.LOCK_EX, self.path, self._notify)
            with raising_disk_full(self.path):
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
        """Release the lock, even if child processes have inherited the open file."""
        if self._file is not None:
            fcntl.flock(self._file, fcntl.LOCK_UN)
            self._file.close()
            self._file = None


def refuse_if_locked(path: Path, notify: Notify | None = None) -> None:
    """Raise `InUse` if another process holds the lock. Waits like `RunLock`, but does not keep the lock."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        _take(file, fcntl.LOCK_SH, path, notify)


def _take(file: IO[str], kind: int, path: Path, notify: Notify | None) -> None:
    """Take a lock of `kind`. Raises `InUse` if another process holds it and does not release it in time."""
    began, notified = time.monotonic(), False
    patience = _PATIENCE_SECONDS if notify is None else _patience()
    while not _taken(file, kind, path):
        waited = time.monotonic() - began
        if waited > patience:
            raise InUse(
                f"{path.parent} is in use by {_owner(path)}: wait for that run to end, stop it, or choose another "
                "output_dir; if its machine is dead, wait some minutes for the file server to notice, or delete "
                f"{path}"
            )
        if notify is not None and waited > _NOTIFY_SECONDS and not notified:
            notified = True
            notify(f"waiting up to {patience:g} s for the lock of {path.parent}, which {_owner(path)} holds")
        time.sleep(_POLL_SECONDS)


def _taken(file: IO[str], kind: int, path: Path) -> bool:
    """Try once to take the lock. Raises `BadInput` if the file system has no locks."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        raise BadInput(
            f"the file system of {path.parent} cannot lock files ({error.strerror}), so two runs could write there at "
            "the same time: have it mounted with locks (Lustre: mount option flock), or choose another output_dir"
        ) from error
    return True


def _patience() -> float:
    """Seconds to wait for a lock that is held; Slurm's environment has the number of restarts of a job."""
    restarts = os.environ.get("SLURM_RESTART_COUNT", "")
    return _REQUEUED_PATIENCE_SECONDS if restarts.isdecimal() and int(restarts) > 0 else _PATIENCE_SECONDS


def _owner(path: Path) -> str:
    """The process that holds the lock, for messages."""
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
        return f"process {owner['pid']} on {owner['host']}"
    except (OSError, ValueError, KeyError, TypeError):  # it has not written its name yet
        return "another process"
