"""Whole runs through the coordinator: does each stage, offload and method start, train, score, save and export?

They are about what works and whether two equal runs end with equal bits, not about time: several run at once.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cl_dist.benchmarks.gpu.ceilings import cpu_count
from cl_dist.benchmarks.gpu.measuring import Record, first_lines
from cl_dist.launch.child import PROGRAM, python_command

BASE = (
    "launch.processes=1",
    "train.max_steps_per_task=3",
    "stream.max_eval_samples=8",
    "checkpoint.every_steps=2",
    "eval.before_training=false",
)
RUN_SECONDS = 80
SIDE_BY_SIDE = 4
CORES_PER_RUN = 3


@dataclass(frozen=True)
class Case:
    """A run, and the earlier one that it has to equal bit by bit."""

    name: str
    settings: tuple[str, ...]
    twin: str | None = None


MIGU, KIF, BF16 = "method.name=migu", "method.name=kif", "train.dtype=bfloat16"
OFFLOAD = "zero.offload=true"
CASES = (
    Case("stage 2, MIGU", (MIGU, "zero.stage=2")),
    Case("stage 2, MIGU, again", (MIGU, "zero.stage=2"), "stage 2, MIGU"),
    Case("stage 3, bfloat16, KIF", (KIF, "zero.stage=3", BF16)),
    Case("stage 3, bfloat16, KIF, again", (KIF, "zero.stage=3", BF16), "stage 3, bfloat16, KIF"),
    Case("stage 2, bfloat16, KIF", (KIF, "zero.stage=2", BF16)),
    Case("stage 3, bfloat16, MIGU", (MIGU, "zero.stage=3", BF16)),
    Case("stage 2, offload, MIGU", (MIGU, "zero.stage=2", OFFLOAD, BF16)),
    Case("stage 3, offload, MIGU", (MIGU, "zero.stage=3", OFFLOAD, BF16)),
    Case("stage 3, offload, KIF", (KIF, "zero.stage=3", OFFLOAD, BF16)),
    Case("stage 0, bfloat16, MIGU", (MIGU, "zero.stage=0", BF16)),
    Case("stage 1, bfloat16, MIGU, LoRA", (MIGU, "zero.stage=1", BF16, "model.lora={r: 4}")),
    Case("stage 2, MIGU, mask: update", (MIGU, "zero.stage=2", "method.mask=update", "method.first_task=masked")),
    Case("stage 2, MIGU, accumulation", (MIGU, "zero.stage=2", "train.gradient_accumulation=2")),
    Case("stage 2, sequential", ("method.name=sequential", "zero.stage=2")),
)


def measure(record: Record, device: torch.device) -> None:
    """Run the cases side by side; those that there is no time for are left to the next call."""
    # A missing package skips the part instead of failing every case.
    import deepspeed  # noqa: F401

    import cl_dist.assembly  # noqa: F401

    cases = CASES if not record.tiny else CASES[:2]
    done = record.content["measurements"]
    workers = max(1, min(SIDE_BY_SIDE, cpu_count() // CORES_PER_RUN))
    with tempfile.TemporaryDirectory(prefix="cl-dist-gpu-") as folder, ThreadPoolExecutor(workers) as pool:
        started = {case.name: pool.submit(_run, case, Path(folder), record) for case in cases if case.name not in done}
        for case in cases:
            if case.name in started:
                record.put(case.name, _with_twin(case, started[case.name].result(), done))


def _with_twin(case: Case, found: dict[str, Any], done: dict[str, Any]) -> dict[str, Any]:
    twin = done.get(case.twin or "", {})
    if "sha256" not in found or "sha256" not in twin:
        return found
    return {**found, "equals": case.twin, "equal_bits": found["sha256"] == twin["sha256"]}


def _run(case: Case, folder: Path, record: Record) -> dict[str, Any]:
    out = folder / case.name.replace(" ", "-").replace(",", "").replace(":", "")
    settings = (*BASE, *(("stream.max_train_samples=16",) if record.tiny else ()), *case.settings, f"output_dir={out}")
    words = [word for setting in settings for word in ("--set", setting)]
    command = [*python_command(PROGRAM), "run", "quickstart", "--fresh", *words]
    began = time.monotonic()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=RUN_SECONDS)
    except subprocess.TimeoutExpired:
        return {"failed": f"took longer than {RUN_SECONDS} s"}
    found: dict[str, Any] = {"seconds": time.monotonic() - began, "exit_code": done.returncode}
    if done.returncode != 0:
        return {**found, "failed": first_lines("\n".join(done.stderr.splitlines()[-3:]))}
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    return {**found, "sha256": _digest(out), "device": metrics.get("device"), "step_seconds": metrics["step_seconds"]}


def _digest(run: Path) -> str:
    """Digest of the last task's exported weights."""
    last = max((run / "tasks").iterdir())
    digest = hashlib.sha256()
    for path in sorted(last.glob("model/*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
