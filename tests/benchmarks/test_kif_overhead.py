"""The script that measures KIF's share of a training step."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMALL = ("--blocks", "2", "--steps", "2", "--tokens", "32", "--length", "16")


@pytest.mark.parametrize(("lora", "trained"), [("8", "LoRA r 8"), pytest.param("0", "full", marks=pytest.mark.slow)])
def test_prints_one_line(lora: str, trained: str) -> None:
    command = [sys.executable, "benchmarks/kif_overhead.py", "--lora", lora, *SMALL]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    table = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len(table) == 3
    assert table[2].startswith(f"| builtin:llama-tiny | {trained} | 2 | 1 | 32 | ")
    milliseconds = [float(number) for number in re.findall(r"([\d.]+) ms", table[2])]
    assert len(milliseconds) == 3
    assert all(number > 0 for number in milliseconds)
