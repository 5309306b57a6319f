"""What a step asks of the GPU: kernels, launches, host waits and where they are, and how long the GPU is idle."""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "hipLaunchKernel", "hipModuleLaunchKernel")
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "hipStreamSynchronize")
SHOWN = 12


def profiled(step: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """Run `step` once under the profiler, after a warm-up; counts are null on a CPU.

    Returns:
        `host_seconds` until the step is complete, `operators` that PyTorch dispatched, nested ones included, and, on a
        GPU, `kernels` (copies too), `launches`, `host_waits`, `busy_seconds` and `idle_seconds` of the GPU between its
        first and last kernel, and `slowest_kernels` with the seconds of all their runs.
    """
    on_gpu = device.type == "cuda"
    step()
    if on_gpu:
        torch.cuda.synchronize(device)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as found:
        began = time.perf_counter()
        step()
        if on_gpu:
            torch.cuda.synchronize(device)
        took = time.perf_counter() - began
    events: list[Any] = list(found.events() or ())
    operators = sum(event.name.startswith("aten::") for event in events)
    return {"host_seconds": took, "operators": operators, **(_on_gpu(events) if on_gpu else _NOT_COUNTED)}


_NOT_COUNTED = dict.fromkeys(("kernels", "launches", "host_waits", "busy_seconds", "idle_seconds", "slowest_kernels"))


def _on_gpu(events: list[Any]) -> dict[str, Any]:
    spans = sorted((e.time_range.start, e.time_range.end, e.name) for e in events if "CUDA" in str(e.device_type))
    # Kernels of several streams may overlap, so count the time that at least one of them runs.
    busy, last = 0.0, float("-inf")
    seconds: Counter[str] = Counter()
    for start, end, name in spans:
        busy += max(0.0, end - max(start, last))
        last = max(last, end)
        seconds[name[:80]] += (end - start) / 1e6
    whole = last - spans[0][0] if spans else 0.0
    # One wait is the profiled step's own, at its end.
    return {
        "kernels": len(spans),
        "launches": sum(event.name.startswith(LAUNCHES) for event in events),
        "host_waits": sum(event.name.startswith(WAITS) for event in events) - 1,
        "busy_seconds": busy / 1e6,
        "idle_seconds": (whole - busy) / 1e6,
        "slowest_kernels": dict(seconds.most_common(SHOWN)),
    }


def waits(step: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """Where in the code the host waits for the GPU in one step: `file:line` and how often; empty on a CPU."""
    if device.type != "cuda":
        return {"waits": {}}
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    places = (f"{'/'.join(Path(each.filename).parts[-2:])}:{each.lineno}" for each in caught if _is_wait(each))
    return {"waits": dict(Counter(places).most_common())}


def _is_wait(warning: warnings.WarningMessage) -> bool:
    return "synchroniz" in str(warning.message)
