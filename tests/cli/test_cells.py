"""Runs of a sweep's cells that fail, are stopped or are killed."""

from __future__ import annotations

import csv
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cl_dist.state.lock import RunLock
from cl_dist.state.manifest import Manifest
from tests.cli.conftest import Command
from tests.ranks import REPOSITORY
from tests.recipes import write_recipe

PATIENCE_SECONDS = 600.0


@pytest.mark.parametrize(("options", "failed"), [([], 2), (["--stop-on-failure"], 1)])
def test_a_failing_run_ends_the_sweep_only_with_stop_on_failure(
    command: Command, tmp_path: Path, options: list[str], failed: int
) -> None:
    """Both run folders contain another file, so `cl-dist run` refuses them."""
    recipe = write_recipe(tmp_path)
    for name in ("sequential", "migu"):
        folder = tmp_path / "sweep" / "runs" / "own" / name / "seed0"
        folder.mkdir(parents=True)
        (folder / "letter.txt").write_text("not a run")
    grid = ("--methods", "sequential,migu", "--seeds", "0", "--out", "sweep")
    code, output, error = command("compare", recipe, *grid, *options)
    assert code == 1
    assert output.count(": starting in ") == output.count(": failed: ") == failed
    assert "[1/2] own sequential seed0: failed: output_dir" in output
    assert error.splitlines()[-1] == f"cl-dist: error: {failed} of 2 runs failed; the same command tries them again"


Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start a sweep of the recipe in `tmp_path`; it is killed at the end of the test."""
    started = []

    def go(*options: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "cl_dist", "compare", "recipe.yaml", "--out", "sweep", *options]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": ""}
        started.append(
            subprocess.Popen(
                command, cwd=tmp_path, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
        )
        return started[-1]

    yield go
    for process in started:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def wait_for_steps(run: Path, steps: int) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        log = run / "log.jsonl"
        if log.exists() and log.read_text().count('"step"') >= steps:
            return
        time.sleep(0.02)
    pytest.fail("the run took no steps")


def ended(process: subprocess.Popen[str], code: int) -> str:
    output, _ = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == code, output
    return output


def manifest_of(run: Path) -> Manifest:
    return Manifest.read(run / "manifest.json")


def wait_until_released(run: Path) -> None:
    """Wait until the run whose sweep was killed has saved its state and ended."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        if manifest_of(run).status == "interrupted":
            with RunLock(run / ".lock"):
                return
        time.sleep(0.05)
    pytest.fail("the run continues without its sweep")


@pytest.mark.slow
def test_a_sweep_continues_after_a_stop_a_failure_and_a_kill(tmp_path: Path, start: Start) -> None:
    """Two methods and two seeds: Ctrl-C in the second run, a failure of the third, then SIGKILL during the third."""
    write_recipe(tmp_path, train={"epochs": 16}, launch={"processes": 1})
    options, runs = ("--methods", "sequential,migu", "--seeds", "0,1"), tmp_path / "sweep" / "runs" / "own"
    first, second, third, last = (runs / name / f"seed{seed}" for seed in (0, 1) for name in ("sequential", "migu"))

    sweep = start(*options)
    wait_for_steps(second, 3)
    assert "| own | sequential | 1 of 2 | " in (tmp_path / "sweep" / "table.md").read_text()
    sweep.send_signal(signal.SIGINT)
    assert "stopped in own migu seed0" in ended(sweep, 75).splitlines()[-1]
    assert manifest_of(second).status == "interrupted"
    finished = manifest_of(first)

    third.mkdir(parents=True)
    (third / "letter.txt").write_text("not a run")
    output = ended(start(*options), 1).splitlines()
    assert output[-1] == "cl-dist: error: 1 of 4 runs failed; the same command tries them again"
    assert "own sequential seed1: output_dir" in output[-2]
    assert [manifest_of(run).status for run in (first, second, last)] == ["finished"] * 3
    assert table(tmp_path)["sequential", "1"]["status"] == "missing"
    (third / "letter.txt").unlink()

    sweep = start(*options)
    wait_for_steps(third, 3)
    sweep.kill()
    sweep.communicate()
    wait_until_released(third)

    ended(start(*options), 0)
    assert manifest_of(first) == finished
    assert [manifest_of(run).restarts for run in (first, second, third, last)] == [0, 1, 1, 0]
    assert all(manifest_of(run).status == "finished" for run in (first, second, third, last))
    check_table(tmp_path, runs)


def check_table(folder: Path, runs: Path) -> None:
    """Compare table.csv with metrics.json of the four runs."""
    lines = table(folder)
    for method in ("sequential", "migu"):
        scores = [json.loads((runs / method / f"seed{seed}" / "metrics.json").read_text()) for seed in (0, 1)]
        for name in ("average_performance", "backward_transfer", "forgetting", "learning_accuracy"):
            values = [score[name] for score in scores]
            assert float(lines[method, "mean"][name]) == pytest.approx(statistics.mean(values), abs=1e-12)
            assert float(lines[method, "std"][name]) == pytest.approx(statistics.stdev(values), abs=1e-12)


def table(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Lines of table.csv by method and seed."""
    text = (folder / "sweep" / "table.csv").read_text()
    return {(line["method"], line["seed"]): line for line in csv.DictReader(text.splitlines())}
