"""The compiled code of every kernel for every supported GPU, read with the compilers' own tools."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from cl_dist.kernels import backend
from tests.kernels.launches import CASES, Case
from tests.ranks import REPOSITORY

pytestmark = pytest.mark.skipif(backend.triton is None, reason="Triton is not installed")


def each(cases: list[Case]) -> pytest.MarkDecorator:
    """Run a test for every case on every GPU that it runs on."""
    pairs = [pytest.param(case, target, id=f"{case.name}-{target}") for case in cases for target in case.targets]
    return pytest.mark.parametrize(("case", "target"), pairs)


@pytest.fixture(scope="module")
def compiled() -> dict[tuple[str, str], dict[str, Any]]:
    """All kernels, compiled in one process that does not interpret them."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.aot", "--json"]
    run = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert run.returncode == 0, run.stderr
    return {(result["kernel"], result["target"]): result for result in json.loads(run.stdout)}


@each(CASES)
def test_no_register_is_spilled(compiled: dict[tuple[str, str], dict[str, Any]], case: Case, target: str) -> None:
    assert compiled[case.name, target]["spills"] == 0


@each([case for case in CASES if case.wide])
def test_streams_move_16_bytes_at_a_time(
    compiled: dict[tuple[str, str], dict[str, Any]], case: Case, target: str
) -> None:
    result = compiled[case.name, target]
    narrow = result[f"{case.wide}s"] - result[f"wide_{case.wide}s"]
    assert result[f"wide_{case.wide}s"] > 0
    assert narrow <= case.narrow, result


@each(CASES)
def test_the_stated_occupancy_is_reached(
    compiled: dict[tuple[str, str], dict[str, Any]], case: Case, target: str
) -> None:
    result = compiled[case.name, target]
    assert result["resident"] >= (case.waves if target == "gfx942" else case.warps), result


@pytest.mark.parametrize("case", [case for case in CASES if case.long], ids=lambda case: case.name)
def test_addresses_are_computed_in_64_bits(compiled: dict[tuple[str, str], dict[str, Any]], case: Case) -> None:
    assert compiled[case.name, "sm_90"]["long"]
