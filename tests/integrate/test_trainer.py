from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.integrate.jobs import STEPS, TASKS
from tests.integrate.test_session import BOTH, MIGU, ULP
from tests.ranks import run_ranks

CASES: dict[str, dict[str, Any]] = {
    "DDP": {"method": BOTH, "accumulation": 2, "resume": True},
    "ZeRO 2": {"method": BOTH, "stage": 2, "accumulation": 2, "resume": True},
    "ZeRO 3": {"method": MIGU, "stage": 3},
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Of rank 0; both ranks have whole weights."""
    arguments = {"cases": list(CASES.values()), "folder": str(tmp_path_factory.mktemp("checkpoints"))}
    found = run_ranks("tests.integrate.trainer_jobs:run_cases", world=2, arguments=arguments)
    return dict(zip(CASES, found[0], strict=True))


@pytest.mark.parametrize("case", CASES)
def test_a_trainer_ends_with_the_weights_of_our_own_engine(results: dict[str, Any], case: str) -> None:
    found = results[case]
    assert found["moved"] > 1e-3
    assert found["error"] <= TASKS * STEPS * ULP
    assert found["masked"] == (TASKS - 1) * STEPS
    assert found["dropped"] > 0
    assert found["flips"] == 0


def test_a_single_process_needs_no_launcher_and_evaluation_changes_nothing(tmp_path: Path) -> None:
    [found] = run_ranks("tests.integrate.trainer_jobs:alone", world=1, arguments={"folder": str(tmp_path)})
    assert found == {"same": True, "masks": True, "tasks": [2, 2]}
