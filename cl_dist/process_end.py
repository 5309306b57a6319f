"""Ends a process that has been a rank, before Python's own shutdown can run into live threads."""

from __future__ import annotations

import atexit
import logging
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn


def end_with(main: Callable[[], int]) -> NoReturn:
    """Call `main` and exit with the code that it returns.

    If torch is loaded, the process ends as soon as all `atexit` handlers have run. DeepSpeed never destroys its
    process group, and a lost rank leaves collectives in flight. Their threads release tensors at some later time, for
    which they need the interpreter, and abort the process (exit code 134) if Python is shutting down by then.
    """
    end = _End()
    # Registered before torch and others register their handlers, and therefore called after those.
    atexit.register(end.now)
    try:
        end.code = main()
    except SystemExit as error:
        end.code = error.code if isinstance(error.code, int) else int(error.code is not None)
        raise
    sys.exit(end.code)


class _End:
    def __init__(self) -> None:
        self._process = os.getpid()
        self.code = 1
        """Exit code; 1 unless `main` returns, since then an exception ends the process."""

    def now(self) -> None:
        """Exit now, unless torch has started no threads, or this is a fork, which has its own exit code."""
        if "torch" not in sys.modules or os.getpid() != self._process:
            return
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):  # closed, or without a reader
                stream.flush()
        os._exit(self.code)
