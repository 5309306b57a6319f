"""The hardware's limits, measured as contestants (reading, updating, multiplying), and a description of the machine."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cl_dist.benchmarks.harness import Contestant, Spread, Times

READ, UPDATE, PRODUCT = "read", "update", "product"
"""Names of the limits among the contestants."""
MOST_MOVED = 768 << 20
"""Maximum number of bytes that a limit's run moves; for larger operations its rate is extrapolated."""
LEAST_MOVED = 4 << 10
PRODUCT_SIZE = {"cpu": 1536, "cuda": 8192}
"""Width of the square matrices whose product measures peak arithmetic."""


def reading(number: int, device: torch.device) -> tuple[Contestant, int]:
    """A float32 sum that reads about `number` bytes, and the exact number of bytes."""
    elements = min(max(number, LEAST_MOVED), MOST_MOVED) // 4
    a = torch.full((elements,), 1.0, device=device)
    return Contestant(a.sum), 4 * elements


def updating(number: int, device: torch.device) -> tuple[Contestant, int]:
    """An in-place float32 update, `a += b`, that moves about `number` bytes, and the exact number of bytes.

    It is in place, like the operations compared with it: a copy would also read the memory that it overwrites, which
    would not be counted.
    """
    elements = min(max(number, LEAST_MOVED), MOST_MOVED) // 12
    a, b = (torch.full((elements,), 1.0, device=device) for _ in range(2))
    return Contestant(lambda: a.add_(b)), 12 * elements


def product(dtype: torch.dtype, device: torch.device, size: int | None = None) -> tuple[Contestant, int]:
    """A dense product of square matrices, and its number of arithmetic operations."""
    size = size or PRODUCT_SIZE[device.type]
    x, y = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(x)
    return Contestant(lambda: torch.mm(x, y, out=out)), 2 * size**3


def of_limit(times: Times, name: str, limit: str, work: int, limit_work: int) -> Spread:
    """Share of the limit's rate that a contestant reaches with `work` bytes or operations, computed round by round."""
    pairs = zip(times.seconds[name], times.seconds[limit], strict=True)
    return Spread.of([work / mine / (limit_work / best) for mine, best in pairs])


def memory_rates(times: Times, names: Sequence[str], limit: str, moved: int, limit_moved: int) -> dict[str, Any]:
    """The part of an entry that compares contestants that move `moved` bytes with the memory bandwidth."""
    shares = {name: of_limit(times, name, limit, moved, limit_moved).as_dict() for name in names}
    rates = {name: moved / times.spread(name).median / 1e9 for name in names}
    best = limit_moved / times.spread(limit).median / 1e9
    return {"bytes": moved, "gigabytes_per_second": {**rates, limit: best}, "of_limit": shares}


def machine(device: torch.device) -> dict[str, Any]:
    """Description of the machine and the software."""
    found: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
        "device": device.type,
    }
    return {**found, **_gpu(device)} if device.type == "cuda" else found


def _gpu(device: torch.device) -> dict[str, Any]:
    properties: Any = torch.cuda.get_device_properties(device)
    clock, bus = (getattr(properties, name, None) for name in ("memory_clock_rate", "memory_bus_width"))
    # Clock in kilohertz, bus width in bits; two transfers per cycle.
    peak = None if not clock or not bus else 2 * clock * 1e3 * bus / 8 / 1e9
    return {"gpu": properties.name, "peak_gigabytes_per_second": peak}


def _cpu_model() -> str:
    """The CPU's name according to the system."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text(encoding="utf-8").splitlines() if information.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
