"""The script that compares masks known ahead with those of the other rules."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SMALL = ("--tasks", "2", "--steps", "4", "--accumulation", "2", "--set", "train.micro_batch_size=2")


def test_a_line_per_task_and_masks_that_come_closer() -> None:
    command = [sys.executable, "benchmarks/ahead_masks.py", *SMALL]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("| builtin:llama-tiny | full | ")]
    assert [line.split(" | ")[2:4] for line in lines] == [["spring", "4"], ["summer", "4"]]
    for line in lines:
        task, late, step, _ = (float(share) for share in re.findall(r"([\d.]+) %", line))
        # Random masks would differ in 42 % of the rows. Every step adds less to the sums; a step alone differs most.
        assert 0.0 < late <= task < step < 42.0
