"""`cl-dist doctor`: checks that this machine has everything a run needs."""

from __future__ import annotations

import os
import platform
import shutil
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from cl_dist import __version__
from cl_dist.launch.environment import find_ranks
from cl_dist.machine import cpu_device
from cl_dist.sharding.check import check_deepspeed

PACKAGES = ("torch", "deepspeed", "transformers", "peft", "datasets", "safetensors", "triton", "mpi4py")
OPTIONAL = ("triton", "mpi4py")
GIB = 2**30
LOW_DISK_BYTES = 5 * GIB
LOW_SHARED_MEMORY_BYTES = 2**28


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    name: str
    text: str
    is_problem: bool = False


def add_commands(commands: Any, common: ArgumentParser, changes: ArgumentParser) -> None:
    """Add `doctor`; `commands` is argparse's collection of subparsers."""
    parser = commands.add_parser("doctor", parents=[common])
    parser.set_defaults(command=doctor)


def doctor(arguments: Namespace) -> int:
    """Print the findings; the exit code is 1 if there is a problem."""
    findings = list(_findings())
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        print(f"{'PROBLEM' if finding.is_problem else 'ok':<7}  {finding.name:<{width}}  {finding.text}")
    return int(any(finding.is_problem for finding in findings))


def _findings() -> Iterator[Finding]:
    yield Finding("cl-dist", f"{__version__}, Python {platform.python_version()}, {platform.platform()}")
    for package in PACKAGES:
        yield _package(package)
    for problem in check_deepspeed():
        yield Finding("deepspeed", problem, is_problem=True)
    yield _compiler()
    yield _devices()
    yield _free_space("disk", Path.cwd(), LOW_DISK_BYTES)
    if Path("/dev/shm").is_dir():
        yield _free_space("shared memory", Path("/dev/shm"), LOW_SHARED_MEMORY_BYTES)
    yield _ranks()


def _package(name: str) -> Finding:
    try:
        return Finding(name, metadata.version(name))
    except metadata.PackageNotFoundError:
        optional = name in OPTIONAL
        return Finding(name, "not installed (optional)" if optional else "not installed", is_problem=not optional)


def _compiler() -> Finding:
    """DeepSpeed and Triton compile operators at run time."""
    wanted = os.environ.get("CXX", "c++")
    found = shutil.which(wanted)
    return Finding("C++ compiler", found or f"{wanted} not found; DeepSpeed needs one", is_problem=found is None)


def _devices() -> Finding:
    """What ranks would compute on. A GPU that exists and cannot be used is a problem; a machine without one is not."""
    try:
        from cl_dist.engine.device import find_usable_gpus
    except ImportError as error:
        return Finding("devices", f"torch cannot be imported: {error}", is_problem=True)
    gpus = find_usable_gpus()
    if gpus.problem is None:
        return Finding("devices", "; ".join(gpu.describe() for gpu in gpus.devices))
    if gpus.present:
        return Finding("devices", gpus.problem, is_problem=True)
    return Finding("devices", f"no GPU; {cpu_device().describe()}")


def _free_space(name: str, folder: Path, low: int) -> Finding:
    free = shutil.disk_usage(folder).free
    return Finding(name, f"{free / GIB:.1f} GiB free in {folder}", is_problem=free < low)


def _ranks() -> Finding:
    ranks = find_ranks(os.environ)
    if ranks is None:
        return Finding("ranks", "none; cl-dist run starts them on this machine")
    return Finding("ranks", f"this is rank {ranks.rank} of {ranks.world_size}, started by {ranks.source}")
