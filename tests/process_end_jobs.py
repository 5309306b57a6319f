"""Rank side of test_process_end."""

from __future__ import annotations

import builtins
import threading
import time

SECONDS = 2.0
"""Long enough for the process to end meanwhile, short enough for a test."""
PATIENCE_SECONDS = 30.0


class Slow:
    """An object whose release takes long, and often needs the GIL, outside of the main thread."""

    dropped_by: threading.Thread | None = None

    def __del__(self) -> None:
        """Take long."""
        Slow.dropped_by = threading.current_thread()
        end = time.monotonic() + SECONDS
        while threading.current_thread() is not threading.main_thread() and time.monotonic() < end:
            time.sleep(0.001)


def drops_late() -> bool:
    """Reduce tensors over a group that is never destroyed; returns whether its thread is releasing one by then."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    group = dist.new_group()
    vars(builtins)["kept_by_the_test"] = group
    deadline = time.monotonic() + PATIENCE_SECONDS
    while Slow.dropped_by in (None, threading.main_thread()) and time.monotonic() < deadline:
        Slow.dropped_by = None
        tensor = torch.ones(1000)
        tensor.slow = Slow()  # type: ignore[attr-defined]
        dist.all_reduce(tensor, group=group, async_op=True)
        del tensor
        while Slow.dropped_by is None and time.monotonic() < deadline:
            time.sleep(0.001)
    return Slow.dropped_by not in (None, threading.main_thread())
