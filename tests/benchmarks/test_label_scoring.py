"""Label scoring versus generation: the table agrees with the answers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from cl_dist.benchmarks.label_scoring import read, table
from tests.ranks import REPOSITORY

LABELS = ("good", "bad", "neither good nor bad")
SAMPLES = 13


def write_task(folder: Path) -> None:
    rows = [{"id": n, "input": f"Film number {n}.\nAnswer:", "output": LABELS[n % 3]} for n in range(SAMPLES)]
    for split in ("train", "test"):
        (folder / split).mkdir(parents=True)
        (folder / split / "mood_T5.json").write_text(json.dumps(rows))


def test_every_sample_is_scored_both_ways_once(tmp_path: Path) -> None:
    write_task(tmp_path)
    script = [sys.executable, str(REPOSITORY / "benchmarks" / "label_scoring.py")]
    options = ["--data", ".", "--model", "builtin:llama-tiny", "--tasks", "mood", "--batch", "3", "--length", "60"]
    options += ["--new-tokens", "4", "--csv", "pairs.csv", "--answers", "answers.jsonl"]
    done = subprocess.run([*script, *options], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = read(tmp_path / "pairs.csv")
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert sorted(answer["sample"] for answer in answers) == list(range(SAMPLES))
    assert all(answer["reference"] == LABELS[answer["sample"] % 3] for answer in answers)
    assert sum(line["samples"] for line in lines) == SAMPLES
    right = sum(answer["likelihood"] == answer["reference"] for answer in answers)
    assert sum(line["likelihood_right"] for line in lines) == right
    assert done.stdout.strip() == table(lines)
    assert f"| all | {SAMPLES} |" in done.stdout
