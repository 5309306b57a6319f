#!/usr/bin/env python3
"""What a run costs per task as the number of tasks grows, from real runs with KIF on a CPU.

    python -m cl_dist.benchmarks.growth.tasks [--tasks 1 10 50 100 200] [--method kif] [--write]

Every run is `cl-dist run` on one rank: a tiny Llama, one step and one scored sample per task, after each task the tasks
seen so far are scored; then `cl-dist report`. With so little training, the cost of the tasks themselves is left. With
--write, the rows replace those for the same numbers of tasks in benchmarks/results/growth-tasks.csv, and all of
them make the picture docs/results/growth-tasks.png.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from cl_dist.benchmarks.growth import curves
from cl_dist.benchmarks.growth.curves import Panel
from cl_dist.launch.child import PROGRAM, python_command

NAME = "growth-tasks"
PANELS = (
    Panel(
        "Time per task (CPU)",
        "seconds",
        {
            "train, s a task": "training, one step",
            "save, s a task": "saving the state",
            "score, s a task": "scoring the tasks so far",
            "whole, s a task": "everything, start included",
        },
    ),
    Panel(
        "Memory and files",
        "MiB",
        {
            "peak, MiB": "peak memory of the rank",
            "state, MiB": "state with KIF's vectors",
            "manifest and scores, MiB": "manifest and scores",
            "report, MiB": "report",
        },
    ),
    Panel(
        "The parts that could grow",
        "seconds",
        {"report, s": "cl-dist report", "a score, s": "one score of one task", "rest, s": "start, export and the rest"},
    ),
)


def main() -> None:
    """Run, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, nargs="+", default=[1, 10, 50, 100, 200])
    parser.add_argument("--method", default="kif")
    parser.add_argument("--write", action="store_true", help="replace the CSV file and the picture")
    options = parser.parse_args()
    rows = []
    for tasks in options.tasks:
        with tempfile.TemporaryDirectory(prefix="cl-dist-growth-") as folder:
            rows.append(measure(tasks, options.method, Path(folder)))
        print(rows[-1], flush=True)
    print(curves.table(rows))
    if options.write:
        curves.publish(NAME, rows, "tasks", PANELS)


def measure(tasks: int, method: str, folder: Path) -> dict[str, float]:
    """Run a stream of so many tasks in `folder`, write its report, and return one row."""
    recipe, out = folder / "recipe.yaml", folder / "run"
    recipe.write_text(yaml.safe_dump(content(tasks, method, folder)), encoding="utf-8")
    whole, _ = _command("run", str(recipe))
    report, report_peak = _command("report", str(out))
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    records = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    timings: Sequence[dict[str, Any]] = metrics["timings"]
    saved = [record["seconds"] for record in records if record["event"] == "saved"]
    scoring = sum(timing["evaluate_seconds"] for timing in timings)
    training = sum(timing["train_seconds"] for timing in timings)
    last = max((out / "tasks").glob("*/state"), key=lambda path: path.parent.name)
    return {
        "tasks": tasks,
        "whole, s": whole,
        "whole, s a task": whole / tasks,
        "train, s a task": training / tasks,
        "save, s a task": sum(saved) / tasks,
        "score, s a task": scoring / tasks,
        "a score, s": scoring / (tasks * (tasks + 1) / 2),
        "rest, s": whole - training - sum(saved) - scoring,
        "peak, MiB": max(metrics["peak_memory_bytes"]) / 2**20,
        "state, MiB": _size(last) / 2**20,
        "manifest and scores, MiB": sum((out / name).stat().st_size for name in ("manifest.json", "scores.jsonl"))
        / 2**20,
        "log, MiB": (out / "log.jsonl").stat().st_size / 2**20,
        "report, s": report,
        "report peak, MiB": report_peak,
        "report, MiB": _size(out / "report") / 2**20,
        "run folder, MiB": _size(out) / 2**20,
    }


def content(tasks: int, method: str, folder: Path) -> dict[str, Any]:
    """The recipe, whose data it writes into the folder."""
    names = [f"task-{number:03}" for number in range(tasks)]
    for number, name in enumerate(names):
        for split, way in (("jsonl", "there"), ("test.jsonl", "back")):
            text = f"animal {number} went {way} and {way} again, as {name} says"
            (folder / f"{name}.{split}").write_text(json.dumps({"text": text}) + "\n", encoding="utf-8")
    tasks_of_stream = [
        {"name": name, "format": "jsonl", "path": f"{name}.jsonl", "text_field": "text"} for name in names
    ]
    return {
        "model": {"name_or_path": "builtin:llama-tiny"},
        "stream": {"tasks": tasks_of_stream},
        "method": {"name": method},
        "train": {"micro_batch_size": 1, "max_length": 64},
        "zero": {"stage": 2},
        "launch": {"processes": 1},
        "eval": {"before_training": False, "tasks": "seen"},
        "output_dir": str(folder / "run"),
    }


def _command(*words: str) -> tuple[float, float]:
    """Seconds that a command of cl-dist takes, and the peak memory in MiB of the largest process so far."""
    began = time.monotonic()
    # The model is so small that threads would only wait for each other.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([*python_command(PROGRAM), *words], check=True, stdout=subprocess.DEVNULL, env=environment)
    return time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**10


def _size(folder: Path) -> int:
    """Total size in bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":
    main()
