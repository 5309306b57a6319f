from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cl_dist.benchmarks.growth import width
from cl_dist.benchmarks.harness import Times

ROOT = Path(__file__).parents[3]


def test_what_a_method_adds_is_taken_within_a_round() -> None:
    times = Times({"dense": [1.0, 10.0, 2.0], "kif": [1.5, 10.25, 3.0]})
    found = width.added(times, "kif")
    assert (found.median, found.minimum, found.maximum) == (0.5, 0.25, 1.0)


def test_the_exponent_is_the_slope_on_logarithmic_scales() -> None:
    rows = [{"hidden": 256.0, "it": 3.0}, {"hidden": 512.0, "it": 1.0}, {"hidden": 1024.0, "it": 48.0}]
    assert width.exponent(rows, "it") == pytest.approx(2)


@pytest.mark.slow
def test_every_method_steps_at_every_width() -> None:
    words = ["--hidden", "32", "64", "--tokens", "16", "--runs", "2"]
    command = [sys.executable, "-m", "cl_dist.benchmarks.growth.width", *words]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    head, _, *rows = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert [row.split(" | ")[0] for row in rows] == ["| 32", "| 64"]
    assert all(f"{name}, ms" in head for name in ("dense", "migu", "unskipped", "kif"))
    times = [float(cell) for row in rows for cell in row.strip("| ").split(" | ")[2:6]]
    assert all(number > 0 for number in times)
