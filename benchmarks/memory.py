"""Measures the peak memory of a piece of work."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"
"""proc(5): resets the peak resident set size to its current value."""


@dataclass(frozen=True)
class Peak:
    """Bytes of resident memory, or of GPU memory that PyTorch has allocated."""

    before: int
    highest: int


def peak(work: Callable[[], object], device: torch.device) -> Peak | None:
    """Run `work` and return the memory in use before it and at its peak; None if the system does not report it.

    This does not use getrusage's ru_maxrss, which a process inherits from its parent.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return Peak(before, torch.cuda.max_memory_allocated(device))
    try:
        # Memory that the C library keeps from earlier work would count as in use before.
        with suppress(AttributeError, OSError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)
        _RESET.write_text(_RESET_PEAK)
        before = _kibibytes("VmRSS:")
        work()
        return Peak(before * 1024, _kibibytes("VmHWM:") * 1024)
    except OSError:  # not Linux, or no access to /proc
        return None


def growth(work: Callable[[], object], device: torch.device) -> int | None:
    """Maximum growth of memory in bytes while `work` runs."""
    found = peak(work, device)
    return None if found is None else max(0, found.highest - found.before)


def _kibibytes(field: str) -> int:
    lines = _STATUS.read_text(encoding="utf-8").splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(field)))
