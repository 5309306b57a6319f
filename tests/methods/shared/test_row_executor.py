"""The executor of row masks: the gradient is the dense one with the other rows zeroed, whenever the rows are known."""

from __future__ import annotations

from typing import Any

import pytest

from tests.ranks import run_ranks

JOBS = "tests.methods.shared.row_executor_jobs"
CASES: list[dict[str, Any]] = [
    {"stage": 0, "family": "llama", "early": False, "dropped": "gradient"},
    {"stage": 2, "family": "gpt2", "early": True, "dropped": "update"},
    {"stage": 1, "family": "roberta", "early": True, "dropped": "gradient"},
    {"stage": 3, "family": "gpt2", "early": False, "dropped": "update"},
    {"stage": 3, "family": "llama", "early": True, "dropped": "update"},
]


@pytest.fixture(scope="module")
def reports() -> list[dict[str, Any]]:
    return run_ranks(f"{JOBS}:run", 2, {"cases": CASES}, timeout=300)[0]


@pytest.mark.parametrize("case", range(len(CASES)))
def test_what_is_not_kept_gets_no_gradient(reports: list[dict[str, Any]], case: int) -> None:
    report = reports[case]
    assert report["masked"] > 8
    assert report["apart"] <= 1e-6
    assert report["not zero"] == []
    # Weight decay moves what only gets no gradient.
    assert (report["moved"] == []) == (CASES[case]["dropped"] == "update")


def test_rows_that_are_never_chosen_end_the_run() -> None:
    for message in run_ranks(f"{JOBS}:forgotten", 1, timeout=120)[0]:
        assert "backward ran before the rows of this step were chosen" in message
