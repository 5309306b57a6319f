"""A hanging rank ends the job within a bounded time, however it hangs; it is named, with the ranks' stacks."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.recipes import write_recipe
from tests.runs.test_interrupts import PATIENCE_SECONDS, assert_same, start, wait_for_steps
from tests.zygote import Outcome, Zygote

HANG_SECONDS = 6
"""Longer than a step or an evaluation batch of these tiny runs on a busy machine."""


def hanging_recipe(folder: Path, **launch: Any) -> Path:
    """Long enough (two times 32 steps) for a rank to be stopped in the middle."""
    return write_recipe(
        folder,
        train={"epochs": 8},
        method={"name": "sequential"},
        launch={"hang_seconds": HANG_SECONDS, **launch},
        checkpoint={"every_steps": 8},
    )


def stack(run: Path, rank: int) -> str:
    return (run / "logs" / f"stack-rank{rank}.txt").read_text()


@pytest.fixture(scope="module")
def undisturbed(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    outcome = zygote.run(["run", str(hanging_recipe(folder))], folder, world=2)
    assert outcome.codes == [0, 0], outcome.output
    assert list((folder / "run" / "logs").iterdir()) == []
    return folder / "run"


def test_a_stopped_rank(tmp_path: Path, undisturbed: Path, zygote: Zygote) -> None:
    recipe = hanging_recipe(tmp_path)
    launcher = start(["-m", "cl_dist", "run", str(recipe)], tmp_path)
    wait_for_steps(tmp_path / "run", 3)
    ranks = psutil.Process(launcher.pid).children()
    victim = next(rank for rank in ranks if rank.environ()["RANK"] == "1")
    victim.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    output, _ = launcher.communicate(timeout=PATIENCE_SECONDS)
    assert time.monotonic() - began < 4 * HANG_SECONDS
    last = output.splitlines()[-1]
    assert launcher.returncode == 1, output
    assert last.startswith("cl-dist: error: no progress for 6 s (launch.hang_seconds): rank 1 gives no sign of life, ")
    assert "last seen while" in last
    assert "Traceback" not in output
    assert "distributed_c10d.py" in stack(tmp_path / "run", 0)
    assert not victim.is_running()
    outcome = zygote.run(["run", str(recipe), "--resume"], tmp_path, world=2)
    assert outcome.codes == [0, 0], outcome.output
    assert_same(tmp_path / "run", undisturbed)


def run_with(zygote: Zygote, folder: Path, moment: str, **launch: Any) -> Outcome:
    """A run in which rank 1 meets `moment` at its fifth step."""
    fault = {"moment": moment, "on_rank": 1, "count": 5}
    return zygote.run(["run", str(hanging_recipe(folder, **launch))], folder, world=2, fault=fault)


@pytest.mark.slow
def test_a_dead_loop(tmp_path: Path, zygote: Zygote) -> None:
    outcome = run_with(zygote, tmp_path, "dead loop")
    assert outcome.codes == [76, 76], outcome.output
    said = "".join(outcome.output)
    assert said.count("cl-dist: error: ") == 1
    assert "rank 1 has made no progress for" in said
    assert "while training task spring, step 5, and the others wait for it" in said
    assert "in loop_for_ever" in stack(tmp_path / "run", 1)
    assert "distributed_c10d.py" in stack(tmp_path / "run", 0)


@pytest.mark.slow
def test_a_collective_that_takes_too_long(tmp_path: Path, zygote: Zygote) -> None:
    """Rank 0 waits for gradients, rank 1 at another barrier; Gloo's timeout comes before the watchdog's."""
    outcome = run_with(zygote, tmp_path, "extra collective", timeout_seconds=4, hang_seconds=20)
    assert 76 in outcome.codes
    assert 0 not in outcome.codes
    said = "".join(outcome.output)
    assert "waited longer than 4 s (launch.timeout_seconds) for the others while training task spring, step 5" in said
    assert "Traceback" not in said
    assert "in barrier" in stack(tmp_path / "run", 1)


@pytest.mark.slow
def test_a_collective_that_takes_too_long_without_a_watchdog(tmp_path: Path, zygote: Zygote) -> None:
    outcome = run_with(zygote, tmp_path, "dead loop", timeout_seconds=4, hang_seconds=None)
    assert outcome.codes == [76, -signal.SIGKILL], outcome.output
    assert "rank 0 waited longer than 4 s (launch.timeout_seconds)" in outcome.output[0]
    assert "Timed out waiting" in stack(tmp_path / "run", 0)
