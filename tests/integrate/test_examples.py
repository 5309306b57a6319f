from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

from tests.ranks import REPOSITORY, run_ranks

EXAMPLES = (
    "accelerate_loop",
    "ddp_loop",
    "deepspeed_loop",
    "fsdp2_loop",
    "new_tokens",
    "sft_trainer",
    "single_process",
    "trainer",
)
COVERED = ("accelerate_loop", "ddp_loop", "deepspeed_loop")
"""Loops of which test_session checks more."""
NEED_TRL = ("new_tokens", "sft_trainer")


def skip_without_trl(name: str) -> None:
    if name in NEED_TRL and importlib.util.find_spec("trl") is None:
        pytest.skip("trl is not installed: it needs Python 3.11")


def test_every_example_is_run() -> None:
    scripts = {path.stem for path in (REPOSITORY / "examples").glob("*.py")}
    assert scripts == {*EXAMPLES, "common"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in COVERED else name for name in EXAMPLES]
)
def test_an_example_ends_well(name: str) -> None:
    skip_without_trl(name)
    world = 1 if name == "single_process" else 2
    first, *others = run_ranks("tests.integrate.example_jobs:run", world=world, arguments={"name": f"{name}.py"})
    assert first[-1] == "ok"
    assert all("ok" not in lines for lines in others)


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_starts_its_own_ranks(name: str) -> None:
    skip_without_trl(name)
    command = [sys.executable, str(REPOSITORY / "examples" / f"{name}.py"), "--tiny"]
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "ok"
