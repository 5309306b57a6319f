"""The end of a process that has been a rank: before Python takes itself down, not in the middle of that."""

from __future__ import annotations

import atexit
import logging
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn


def end_with(main: Callable[[], int]) -> NoReturn:
    """Call `main` and end the process with the code that it returns.

    Once torch is loaded the process ends as soon as all that is registered with `atexit` has run. DeepSpeed keeps a
    process group of its own for good, and a lost rank leaves collectives under way: their threads drop tensors when
    they come to it, need Python for that, and abort the process (code 134) where Python is being taken down.
    """
    end = _End()
    atexit.register(end.now)  # before torch and others register theirs, and so called after them
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
        """Where an exception ends the process."""

    def now(self) -> None:
        """End this process, unless it has no threads but Python's, or is a fork that has a code of its own."""
        if "torch" not in sys.modules or os.getpid() != self._process:
            return
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):  # closed, or nobody reads it
                stream.flush()
        os._exit(self.code)
