"""A part whose measurements fail in every way that one can."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch

from cl_dist.benchmarks.gpu.measuring import Record


def measure(record: Record, device: torch.device) -> None:
    record.measure("good", lambda: {"value": 1})
    record.measure("raises", _raise)
    record.measure("lacks a package", _import_missing)
    record.measure("crashes", lambda: os.kill(os.getpid(), signal.SIGSEGV))
    record.measure("hangs", lambda: time.sleep(1000))
    record.measure("last", lambda: {"value": 2})


def endless(record: Record, device: torch.device) -> None:
    """Measures something, then starts a process that sleeps, and waits for it."""
    record.measure("first", lambda: {"value": 1})
    record.measure("sleeps", lambda: _sleep(record))


def _sleep(record: Record) -> dict[str, Any]:
    import subprocess

    child = subprocess.Popen(["sleep", "1000"])
    Path(os.environ["SLEEPER"]).write_text(str(child.pid))
    child.wait()
    return {}


def _raise() -> dict[str, Any]:
    raise RuntimeError("no such\nluck")


def _import_missing() -> dict[str, Any]:
    import a_package_that_nobody_has  # type: ignore[import-not-found]  # noqa: F401

    return {}
