#!/usr/bin/env python3
r"""Trains SmolLM2-135M with several methods on order 1 of the real benchmark; prints the results as a Markdown page.

Usage:
    python benchmarks/first_run.py --data FOLDER --model FOLDER --gguf FILE --out runs/first > table.md
    python benchmarks/first_run.py ... --out runs/kif --methods sequential,kif,tasl,recurrent_kif \
        --set "model.lora={r: 8}" --set train.learning_rate=1e-3 > table.md

Finished runs are not repeated, interrupted ones are resumed. docs/results/first-run.md and kif-order1.md contain its
output.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from cl_dist.launch.child import PROGRAM, python_command

SUMMARY = {
    "average_performance": "AP",
    "backward_transfer": "BWT",
    "forgetting": "forgetting",
    "forward_transfer_zero_shot": "FWT (zero-shot)",
    "learning_accuracy": "learning accuracy",
}


def main() -> None:
    """Run the methods, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder in TaSL layout")
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument("--gguf", help="GGUF file in that folder")
    parser.add_argument("--out", type=Path, default=Path("runs/first"))
    parser.add_argument("--recipe", default="smollm-order1")
    parser.add_argument("--methods", default="sequential,migu", help="names, separated by commas")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting for all runs")
    options = parser.parse_args()
    results = {method: run(options, method) for method in options.methods.split(",")}
    print(
        f"Machine: {os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, Linux, no GPU.\n"
    )
    for method, metrics in results.items():
        print(matrix(method, metrics))
    print(summary(results))


def run(options: argparse.Namespace, method: str) -> dict[str, Any]:
    """Train one method to the end, and return the content of its metrics.json."""
    out = options.out / method
    if (out / "metrics.json").exists():
        return read_metrics(out)
    settings = [f"method.name={method}", f"stream.root={options.data}", f"model.name_or_path={options.model}"]
    settings += [f"model.gguf_file={options.gguf}"] if options.gguf else []
    settings += [f"output_dir={out}", *options.set]
    command = [*python_command(PROGRAM), "run", options.recipe]
    command += [part for setting in settings for part in ("--set", setting)]
    command += ["--resume"] if (out / "manifest.json").exists() else []
    subprocess.run(command, check=True, stdout=sys.stderr)
    return read_metrics(out)


def read_metrics(out: Path) -> dict[str, Any]:
    """The content of a finished run's metrics.json."""
    metrics: dict[str, Any] = json.loads((out / "metrics.json").read_text())
    return metrics


def matrix(method: str, metrics: dict[str, Any]) -> str:
    """One accuracy matrix as a Markdown table."""
    tasks = metrics["tasks"]
    lines = [f"### {method}\n", "| after | " + " | ".join(tasks) + " |", "|---" * (len(tasks) + 1) + "|"]
    names = ["(before training)", *tasks]
    for name, row in zip(names, metrics["accuracy_matrix"], strict=True):
        lines.append(f"| {name} | " + " | ".join("–" if score is None else f"{score:.2f}" for score in row) + " |")
    return "\n".join(lines) + "\n"


def summary(results: dict[str, dict[str, Any]]) -> str:
    """Metrics, times and memory of all methods side by side."""
    lines = ["### Side by side\n", "| | " + " | ".join(results) + " |", "|---" * (len(results) + 1) + "|"]
    for key, name in SUMMARY.items():
        lines.append(f"| {name} | " + " | ".join(f"{metrics[key]:.3f}" for metrics in results.values()) + " |")
    rows: dict[str, list[str]] = {
        "tokens per second, both ranks": [f"{m['tokens_per_second']:.0f}" for m in results.values()],
        "seconds per optimiser step": [f"{m['step_seconds']:.1f}" for m in results.values()],
        "training, seconds": [f"{sum(t['train_seconds'] for t in m['timings']):.0f}" for m in results.values()],
        "evaluation, seconds": [f"{sum(t['evaluate_seconds'] for t in m['timings']):.0f}" for m in results.values()],
        "peak memory per rank, GiB": [f"{max(m['peak_memory_bytes']) / 2**30:.2f}" for m in results.values()],
    }
    lines += [f"| {name} | " + " | ".join(values) + " |" for name, values in rows.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
