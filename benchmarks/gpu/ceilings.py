"""What the machine is and what it can do at most: everything else is compared with these."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cl_dist.benchmarks.gpu.measuring import Record
from cl_dist.benchmarks.harness import Contestant, clock_for, race

PACKAGES = ("torch", "triton", "deepspeed", "transformers", "peft", "accelerate", "pydantic", "numba", "numpy")
LAUNCHES = 1000


def measure(record: Record, device: torch.device) -> None:
    """Versions, then products, memory, launches, and the link between host and device."""
    record.measure("versions", lambda: _versions(device))
    for dtype, tf32 in ((torch.bfloat16, False), (torch.float16, False), (torch.float32, True), (torch.float32, False)):
        name = "tf32" if tf32 else str(dtype).removeprefix("torch.")
        record.measure(f"product {name}", partial(_product, record.size(8192, 128), dtype, tf32, device))
    size = record.size(1 << 30, 1 << 20)
    record.measure("copy", partial(_moves, size, device, "copy"))
    record.measure("fill", partial(_moves, size, device, "fill"))
    record.measure("read", partial(_moves, size, device, "read"))
    record.measure("launches", partial(_launches, device))
    for pinned in (True, False):
        record.measure(f"link {'pinned' if pinned else 'pageable'}", partial(_link, size // 4, device, pinned))
    if torch.cuda.device_count() > 1:
        record.measure("peer copy", partial(_peer_copy, size))


def seconds(work: Callable[[], object], device: torch.device, runs: int = 5) -> float:
    """Median seconds of one call."""
    return race({"it": Contestant(work)}, runs, clock_for(device)).spread("it").median


def _versions(device: torch.device) -> dict[str, Any]:
    found: dict[str, Any] = {name: _version(name) for name in PACKAGES}
    found["cuda"], found["commit"] = torch.version.cuda, _commit()
    if device.type == "cuda":
        properties: Any = torch.cuda.get_device_properties(device)
        fields = ("name", "major", "minor", "multi_processor_count", "total_memory", "L2_cache_size")
        found["properties"] = {field: getattr(properties, field, None) for field in fields}
        found["gpus"] = torch.cuda.device_count()
        query = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,memory.total,power.limit"
        found["nvidia_smi"] = _output("nvidia-smi", f"--query-gpu={query}", "--format=csv")
    return found


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The checkout's commit, with a mark if files differ from it."""
    here = str(Path(__file__).resolve().parents[2])
    commit = _output("git", "-C", here, "rev-parse", "HEAD")
    changed = _output("git", "-C", here, "status", "--porcelain", "--untracked-files=no")
    return f"{commit} (changed)" if commit and changed else commit


def _output(*command: str) -> str | None:
    """A command's standard output; None if it fails or does not exist."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _product(size: int, dtype: torch.dtype, tf32: bool, device: torch.device) -> dict[str, Any]:
    """A product of square matrices of random numbers: zeros would be faster, because they take less power."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        took = seconds(lambda: torch.mm(a, b, out=out), device)
    finally:
        torch.set_float32_matmul_precision(before)
    return {"size": size, "seconds": took, "teraflops": 2 * size**3 / took / 1e12}


def _moves(size: int, device: torch.device, kind: str) -> dict[str, Any]:
    """Bytes per second, counting what is read and what is written."""
    source, target = (torch.ones(size // 4, device=device) for _ in range(2))
    works: dict[str, Callable[[], object]] = {
        "copy": lambda: target.copy_(source),
        "fill": target.zero_,
        "read": source.sum,
    }
    took = seconds(works[kind], device)
    moved = (2 if kind == "copy" else 1) * size
    return {"bytes": moved, "seconds": took, "gigabytes_per_second": moved / took / 1e9}


def _launches(device: torch.device) -> dict[str, Any]:
    """Host time of a launch that nobody waits for, and of one whose result the host waits for, in seconds."""
    from cl_dist.kernels import importance_update_

    one, states = torch.zeros(1, device=device), [torch.zeros(8, device=device) for _ in range(4)]
    works: dict[str, tuple[Callable[[], object], int]] = {
        "torch_launch": (lambda: one.add_(1), LAUNCHES),
        "own_kernel_launch": (lambda: importance_update_(*states), LAUNCHES),
        "host_wait": (one.item, LAUNCHES // 10),
    }
    return {name: _host_seconds(work, times, device) for name, (work, times) in works.items()}


def _host_seconds(work: Callable[[], object], times: int, device: torch.device) -> float:
    for _ in range(3):
        work()
    synchronize(device)
    began = time.perf_counter()
    for _ in range(times):
        work()
    took = (time.perf_counter() - began) / times
    synchronize(device)
    return took


def _link(size: int, device: torch.device, pinned: bool) -> dict[str, Any]:
    """Bytes per second between host memory and the device, each way."""
    host = torch.empty(size, dtype=torch.uint8, pin_memory=pinned and device.type == "cuda")
    there = torch.empty(size, dtype=torch.uint8, device=device)
    ways = {"to_device": lambda: there.copy_(host), "to_host": lambda: host.copy_(there)}
    rates = {f"{name}_gigabytes_per_second": size / seconds(work, device, 3) / 1e9 for name, work in ways.items()}
    return {"bytes": size, "pinned": host.is_pinned() if device.type == "cuda" else False, **rates}


def _peer_copy(size: int) -> dict[str, Any]:
    first, second = (torch.empty(size, dtype=torch.uint8, device=f"cuda:{number}") for number in range(2))
    took = seconds(lambda: second.copy_(first), first.device)
    return {"bytes": size, "gigabytes_per_second": size / took / 1e9}


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def cpu_count() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
