"""The type checker sees the whole product, the folders at the top level included."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

WRONG_CALLS = """
import torch
from cl_dist.benchmarks.shapes import model_of
from cl_dist.kernels import apply_row_mask_
from cl_dist.launch.rendezvous import free_port

shard, keep = torch.ones(4), torch.ones(2, dtype=torch.bool)
apply_row_mask_(shard, 0, 2, keep)
apply_row_mask_(0, shard, 2, keep)
apply_row_mask_(shard, 0, 2, keep, scale=2.0)
free_port(7)
model_of("wide")
"""
FOUND = [(9, "arg-type"), (9, "arg-type"), (10, "call-arg"), (11, "arg-type"), (12, "arg-type")]
"""Line and code of each error."""


def test_wrong_calls_into_the_top_level_folders_are_found(tmp_path: Path) -> None:
    file = tmp_path / "wrong_calls.py"
    file.write_text(WRONG_CALLS)
    command = [sys.executable, "-m", "mypy", "--output", "json", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    problems = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(each["line"], each["code"]) for each in problems if each["severity"] == "error"] == FOUND
