"""Peak memory of a training step, measured in a separate process for each variant."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from typing import Any

import torch

from cl_dist.benchmarks.memory import peak
from cl_dist.benchmarks.training import WAYS, StepSize, build_model, token_ids
from cl_dist.errors import ClDistError
from cl_dist.launch.child import python_command

MEASURED = ("dense", "masked")


def peaks(size: StepSize, device: torch.device) -> dict[str, Any]:
    """Peak memory of a step: `peak_memory_bytes` of the whole process, and `step_memory_bytes` that the step adds.

    Raises ClDistError if a process fails.
    """
    found = {way: _in_fresh_process(way, size, device) for way in MEASURED}
    return {
        "peak_memory_bytes": {way: numbers[0] for way, numbers in found.items()},
        "step_memory_bytes": {way: numbers[1] for way, numbers in found.items()},
    }


def _in_fresh_process(way: str, size: StepSize, device: torch.device) -> list[int | None]:
    task = {"way": way, "size": asdict(size), "device": str(device), "threads": torch.get_num_threads()}
    command = [*python_command("cl_dist.benchmarks.step_memory:program"), json.dumps(task)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ClDistError(f"measuring the memory of the {way} step failed: {last}")
    numbers: list[int | None] = json.loads(done.stdout.splitlines()[-1])
    return numbers


def measure(way: str, size: StepSize, device: torch.device) -> list[int | None]:
    """The peak of the process during one step, and the growth over the memory in use before.

    All variants run once before the measurement, so that what they load and compile does not count.
    """
    model, ids = build_model(size, device), token_ids(size).to(device)
    ways = {name: WAYS[name](model, ids, size.threshold) for name in MEASURED}
    for other in ways.values():
        other.prepare()
        other.step()
        other.remove()
    ways[way].prepare()
    found = peak(ways[way].step, device)
    return [None, None] if found is None else [found.highest, found.highest - found.before]


def program() -> None:
    """Entry point of the process that measures one variant; the task is the only argument."""
    task = json.loads(sys.argv[1])
    torch.set_num_threads(task["threads"])
    print(json.dumps(measure(task["way"], StepSize(**task["size"]), torch.device(task["device"]))))


if __name__ == "__main__":
    program()
