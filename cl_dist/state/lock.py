"""One run at a time in a run folder.

The kernel holds the lock and releases it when the process dies, however it dies; the file's content only says whose it
is. Where a whole machine dies, the file server releases it, as soon as it notices (NFS: when the client's lease ends).
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
from cl_dist.state.atomic import telling_full_disk

_PATIENCE_SECONDS = 0.5
"""How long to wait for a run that is just ending, or for another process that only looks (`refuse_if_locked`)."""
_REQUEUED_PATIENCE_SECONDS = 300.0
"""How long a job waits that Slurm has started again: if its node died, the file server takes minutes to notice."""
_TELL_SECONDS = 5.0
"""After which it is said that, and for whom, it waits."""
_POLL_SECONDS = 0.02
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
"""What file systems say that have no locks, or none now: Lustre without the mount option `flock`, NFS without lockd."""

Tell = Callable[[str], None]
"""Says one line to the user."""


class InUse(BadInput):
    """Another process holds the lock; the message names it."""


class RunLock:
    """Context manager that holds a run folder's lock; `InUse` names the process that holds it already.

    Entering raises `BadInput` where the file system has no locks.

    Args:
        path: The lock file, made if need be and never deleted, since another process may be waiting on it.
        tell: Where it is said that a job which Slurm has started again waits for its dead predecessor's lock; None: it
            does not wait.
    """

    def __init__(self, path: Path, tell: Tell | None = None) -> None:
        self.path, self._tell = path, tell
        self._file: IO[str] | None = None

    def __enter__(self) -> RunLock:
        """Take the lock."""
        file = self.path.open("a+", encoding="utf-8")
        try:
            _take(file, fcntl.LOCK_EX, self.path, self._tell)
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


def refuse_if_locked(path: Path, tell: Tell | None = None) -> None:
    """Raise `InUse` where another process holds the lock; takes nothing, and waits as `RunLock` does."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        _take(file, fcntl.LOCK_SH, path, tell)


def _take(file: IO[str], kind: int, path: Path, tell: Tell | None) -> None:
    """Take a lock of `kind`; `InUse` where another process holds it and does not let go in time."""
    began, told = time.monotonic(), False
    patience = _PATIENCE_SECONDS if tell is None else _patience()
    while not _taken(file, kind, path):
        waited = time.monotonic() - began
        if waited > patience:
            raise InUse(_refusal(path))
        if tell is not None and waited > _TELL_SECONDS and not told:
            told = True
            tell(f"waiting up to {patience:g} s for the lock of {path.parent}, which {_owner(path)} holds")
        time.sleep(_POLL_SECONDS)


def _taken(file: IO[str], kind: int, path: Path) -> bool:
    """Try once; `BadInput` where the file system has no locks."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        raise BadInput(
            f"the file system of {path.parent} cannot lock files ({error.strerror}), so two runs could write there at "
            "once: have it mounted with locks (Lustre: mount option flock), or choose another output_dir"
        ) from error
    return True


def _patience() -> float:
    """Seconds to wait for a lock that is held; Slurm counts in the environment how often it has restarted the job."""
    restarts = os.environ.get("SLURM_RESTART_COUNT", "")
    return _REQUEUED_PATIENCE_SECONDS if restarts.isdecimal() and int(restarts) > 0 else _PATIENCE_SECONDS


def _owner(path: Path) -> str:
    """Who holds the lock."""
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
        return f"process {owner['pid']} on {owner['host']}"
    except (OSError, ValueError, KeyError, TypeError):  # it has the lock but has not written its name yet
        return "another process"


def _refusal(path: Path) -> str:
    """The sentence for a folder that another run is using."""
    return (
        f"{path.parent} is in use by {_owner(path)}: wait for that run to end, stop it, or choose another output_dir; "
        f"if its machine is dead, wait some minutes for the file server to notice, or delete {path}"
    )
