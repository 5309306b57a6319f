#!/usr/bin/env python3
"""How long a user waits: for `--help`, `recipe` and `status`, and for a run's first line, first step and end.

Usage:
    python benchmarks/first_seconds.py --repeats 5 > now.json
    python benchmarks/first_seconds.py --repeats 5 --checkout ../before > both.json

With `--checkout`, the folder of another version, both versions run in turns. Every time is from the start of the
command to the moment at which another process sees the result; the first step is the one that log.jsonl records. The
run is quickstart with one step in each of its four tasks and eight samples to score.
docs/performance.md has a table of the output, and benchmarks/results/first-seconds.json the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

POLL_SECONDS = 0.01
MOST_SECONDS = 300.0
QUICK = ("train.max_steps_per_task=1", "stream.max_eval_samples=8")


def main() -> None:
    """Measure, and print the results as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--checkout", type=Path, action="append", default=[], help="another version (may be repeated)")
    options = parser.parse_args()
    versions = [*options.checkout, Path(__file__).resolve().parents[1]]
    times: dict[str, dict[str, list[float]]] = {str(version.name): {} for version in versions}
    loads = []
    for _ in range(options.repeats):
        for version in versions:
            loads.append(os.getloadavg()[0])
            for name, seconds in measure(version.resolve()).items():
                times[version.name].setdefault(name, []).append(seconds)
    summary = {version: {name: summarise(values) for name, values in found.items()} for version, found in times.items()}
    print(json.dumps({"cores": os.cpu_count(), "load_average": summarise(loads), "seconds": summary}, indent=2))


def summarise(values: list[float]) -> dict[str, Any]:
    """Minimum and median, and all values."""
    rounded = [round(value, 3) for value in values]
    return {"min": min(rounded), "median": round(statistics.median(rounded), 3), "all": rounded}


def measure(version: Path) -> dict[str, float]:
    """Seconds of each kind, once."""
    with tempfile.TemporaryDirectory() as folder:
        found = {word: ended(start(version, folder, word)) for word in ("--help", "recipe")}
        found |= run(version, folder)
        found["status"] = ended(start(version, folder, "status", "run"))
    return found


def start(version: Path, folder: str, *arguments: str) -> subprocess.Popen[bytes]:
    """Start `cl-dist` of a version in `folder`."""
    return subprocess.Popen(
        [sys.executable, "-m", "cl_dist", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(version)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )


def ended(process: subprocess.Popen[bytes]) -> float:
    """Seconds until a process that was just started ends."""
    began = time.perf_counter()
    process.communicate()
    if process.returncode != 0:
        raise SystemExit(f"{process.args!r} ended with exit code {process.returncode}")
    return time.perf_counter() - began


def run(version: Path, folder: str) -> dict[str, float]:
    """Seconds until the first line, the first step and the end of a short quickstart."""
    began = time.perf_counter()
    changes = [word for change in (*QUICK, "output_dir=run") for word in ("--set", change)]
    process = start(version, folder, "run", "quickstart", *changes)
    assert process.stdout is not None
    process.stdout.readline()
    found = {"first line": time.perf_counter() - began}
    log = Path(folder, "run", "log.jsonl")
    while not (log.exists() and '"loss"' in log.read_text(encoding="utf-8")):
        if process.poll() is not None or time.perf_counter() - began > MOST_SECONDS:
            raise SystemExit(f"no step after {time.perf_counter() - began:.0f} s")
        time.sleep(POLL_SECONDS)
    found["first step"] = time.perf_counter() - began
    process.communicate()
    if process.returncode != 0:
        raise SystemExit(f"{process.args!r} ended with exit code {process.returncode}")
    return {**found, "end": time.perf_counter() - began}


if __name__ == "__main__":
    main()
