#!/usr/bin/env python3
r"""The cost of checkpoints inside a task, as a share of the training time at the default interval, as a Markdown table.

Usage:
    python benchmarks/checkpoint_cost.py --model FOLDER [--gguf FILE] [--out runs/checkpoint-cost]

Runs `cl-dist run` on generated data with two ranks under ZeRO-2 and a checkpoint every few steps, for full fine-tuning
and for LoRA, with MIGU and with KIF, whose state is twice as large, and reads the times from the run's log. The result
is the ratio of two medians of the same run, so that a busy machine affects both. A save includes everything that keeps
the ranks from training: collecting, checksums, writing, fsync, and deleting older states.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from cl_dist.config.schema import CheckpointConfig
from cl_dist.launch.child import PROGRAM, python_command

EVERY = 3
SAVES = 4
METHODS = ("migu", "kif")


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin:llama-tiny")
    parser.add_argument("--gguf", help="GGUF file in the model's folder")
    parser.add_argument("--lora", type=int, default=8, help="rank of the adapters")
    parser.add_argument("--tokens", type=int, default=64, help="longest sample")
    parser.add_argument("--out", type=Path, default=Path("runs/checkpoint-cost"))
    options = parser.parse_args()
    interval = CheckpointConfig().every_steps
    print(f"| method | trained | checkpoint | step | save | share of the time with a save every {interval} steps |")
    print("|---|---|---|---|---|---|")
    for method in METHODS:
        for lora in (options.lora, 0):
            print(line(options, method, lora, interval or 0), flush=True)


def line(options: argparse.Namespace, method: str, lora: int, interval: int) -> str:
    """Train once and return a line of the table."""
    out = options.out / f"{method}-{f'lora{lora}' if lora else 'full'}"
    out.mkdir(parents=True, exist_ok=True)
    recipe = out / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(content(options, method, lora, out)))
    subprocess.run([*python_command(PROGRAM), "run", str(recipe), "--fresh"], check=True, stdout=sys.stderr)
    records = [json.loads(text) for text in (out / "run" / "log.jsonl").read_text().splitlines()]
    step = median(record["seconds"] for record in records if record["event"] == "step")
    saves = [record for record in records if record["event"] == "saved" and record["step"] < EVERY * SAVES]
    save = median(record["seconds"] for record in saves)
    kind = f"LoRA r {lora}" if lora else "full"
    task = out / "run" / "tasks" / "01-spring"
    # The end state of a task lacks AdamW's two moments, each as large as the float32 weights.
    size = total(task / "state", "*") + 2 * total(task / "model", "*.safetensors")
    return (
        f"| {method} | {kind} | {size / 2**20:.0f} MiB | {step:.2f} s | {save:.2f} s "
        f"| {100 * save / (save + interval * step):.2f} % |"
    )


def total(folder: Path, pattern: str) -> int:
    """Total size in bytes of the matching files in a folder."""
    return sum(file.stat().st_size for file in folder.glob(pattern))


def content(options: argparse.Namespace, method: str, lora: int, out: Path) -> dict[str, Any]:
    """The recipe."""
    model: dict[str, Any] = {"name_or_path": options.model, "gguf_file": options.gguf}
    tasks: Sequence[dict[str, str]] = [{"name": "spring", "format": "builtin"}]
    return {
        "model": {**model, "lora": {"r": lora}} if lora else model,
        "stream": {"tasks": tasks, "max_train_samples": 8 * EVERY * SAVES, "max_eval_samples": 4},
        "method": {"name": method},
        "train": {"micro_batch_size": 4, "max_length": options.tokens},
        "zero": {"stage": 2},
        "launch": {"processes": 2},
        "eval": {"before_training": False},
        "checkpoint": {"every_steps": EVERY, "keep": 1},
        "output_dir": str(out / "run"),
    }


if __name__ == "__main__":
    main()
