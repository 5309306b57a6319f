"""How much memory a piece of work takes at its peak."""

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
"""proc(5): sets the peak of the resident set to what is resident now."""


@dataclass(frozen=True)
class Peak:
    """Bytes of a process's memory, or of a GPU's that PyTorch has handed out."""

    before: int
    highest: int


def peak(work: Callable[[], object], device: torch.device) -> Peak | None:
    """Run `work` and return what was in use before it and at most; None where the system does not tell.

    Not getrusage's ru_maxrss: a process inherits that one from the process that has started it.
    """
    if device.type == "cuda":
        return _peak_of_gpu(work, device)
    try:
        _return_free_memory()
        _RESET.write_text(_RESET_PEAK)
        before = _kibibytes("VmRSS:")
        work()
        return Peak(before * 1024, _kibibytes("VmHWM:") * 1024)
    except OSError:  # not Linux, or /proc is closed
        return None


def growth(work: Callable[[], object], device: torch.device) -> int | None:
    """Bytes by which memory grows at most while `work` runs."""
    found = peak(work, device)
    return None if found is None else max(0, found.highest - found.before)


def _peak_of_gpu(work: Callable[[], object], device: torch.device) -> Peak:
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    torch.cuda.synchronize(device)
    return Peak(before, torch.cuda.max_memory_allocated(device))


def _return_free_memory() -> None:
    """Otherwise what the C library keeps from earlier work would count as there before."""
    with suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _kibibytes(field: str) -> int:
    lines = _STATUS.read_text(encoding="utf-8").splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(field)))
