"""A rank's stacks, where they can be found afterwards: of a hang, and of a process that dies of an error in C.

torch ends a process with SIGABRT when an NCCL operation takes too long; the Python stacks of all threads say where.
"""

from __future__ import annotations

import faulthandler
import threading
from datetime import datetime
from pathlib import Path
from types import TracebackType


class Stacks:
    """Context manager over `stack-rank<N>.txt`, which is there afterwards only if something was written.

    Args:
        folder: Made if need be.
        rank: This process's rank.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self.path, self._rank = folder / f"stack-rank{rank}.txt", rank

    def __enter__(self) -> Stacks:
        """Open the file now: when it is needed, opening may be what hangs."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a", encoding="utf-8")
        self._was_enabled = faulthandler.is_enabled()
        faulthandler.enable(self._file)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the file, and leave none behind that is empty."""
        faulthandler.enable() if self._was_enabled else faulthandler.disable()
        empty = self._file.tell() == 0
        self._file.close()
        if empty:
            self.path.unlink(missing_ok=True)

    def write(self, reason: str, details: str = "") -> None:
        """Append the stacks of all threads, the innermost call first, under a heading with time, rank and `reason`."""
        names = ", ".join(f"{thread.ident or 0:#018x} {thread.name}" for thread in threading.enumerate())
        self._file.write(f"=== {datetime.now():%Y-%m-%d %H:%M:%S} rank {self._rank}: {reason}\n")
        self._file.write(f"{details}threads: {names}\n")
        self._file.flush()
        faulthandler.dump_traceback(self._file, all_threads=True)
        self._file.write("\n")
        self._file.flush()
