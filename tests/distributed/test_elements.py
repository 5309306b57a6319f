"""GMT and MoFO choose the same elements on 1, 2 and 3 ranks as a dense run that sorts whole tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.chosen import Reports, by_world, run_by_world
from tests.ranks import run_ranks

JOBS = "tests.distributed.elements_jobs"
RELEASED = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
SUB_GROUPS = {"zero_optimization": {"stage3_param_persistence_threshold": 0, "sub_group_size": 3000}}
CASES: dict[int, list[dict[str, Any]]] = {
    1: [
        {"method": "gmt", "stage": 0, "accumulation": 3, "clip": 0.1},
        {"method": "mofo", "stage": 0, "clip": 0.1, "decay": 0.1},
        {"method": "mofo", "stage": 3, "deepspeed": RELEASED},
    ],
    2: [
        {"method": "gmt", "stage": 0, "family": "roberta", "clip": 0.1},
        {"method": "gmt", "stage": 1, "clip": 0.1, "decay": 0.1, "parameters": "body"},
        {"method": "gmt", "stage": 2, "accumulation": 3, "recompute": True, "family": "gpt2"},
        {"method": "gmt", "stage": 3, "accumulation": 3, "clip": 0.1, "deepspeed": RELEASED},
        {"method": "gmt", "stage": 1, "offload": True, "clip": 0.1, "accumulation": 3},
        {"method": "gmt", "stage": 3, "offload": True, "clip": 0.1},
        {"method": "gmt", "stage": 2, "dtype": "bfloat16", "clip": 0.1},
        {"method": "gmt", "stage": 1, "dtype": "bfloat16", "grad_dtype": "float32", "clip": 0.1},
        {"method": "gmt", "stage": 0, "dtype": "bfloat16"},
        {"method": "gmt-update", "stage": 2, "clip": 0.1, "decay": 0.1},
        {"method": "gmt-update", "stage": 3, "deepspeed": SUB_GROUPS, "decay": 0.1, "offload": True},
        {"method": "gmt-update", "stage": 0, "family": "lora", "keep": 0.5},
        {"method": "mofo", "stage": 0, "family": "gpt2", "accumulation": 3, "decay": 0.1},
        {"method": "mofo", "stage": 1, "family": "roberta", "clip": 0.1, "decay": 0.1},
        {"method": "mofo", "stage": 2, "accumulation": 3, "clip": 0.1, "recompute": True},
        {"method": "mofo", "stage": 2, "family": "lora", "parameters": ["*q_proj*", "*mlp*"]},
        {"method": "mofo", "stage": 3, "accumulation": 3, "clip": 0.1, "decay": 0.1, "deepspeed": SUB_GROUPS},
        {"method": "mofo", "stage": 1, "offload": True, "clip": 0.1, "decay": 0.1},
        {"method": "mofo", "stage": 3, "offload": True, "clip": 0.1, "deepspeed": SUB_GROUPS, "parameters": "all"},
        {"method": "mofo", "stage": 2, "dtype": "bfloat16", "clip": 0.1, "decay": 0.1},
        {"method": "mofo", "stage": 3, "dtype": "bfloat16", "deepspeed": RELEASED},
        {"method": "mofo", "stage": 0, "dtype": "bfloat16"},
    ],
    3: [
        {"method": "gmt", "stage": 2, "accumulation": 3, "clip": 0.1},
        {"method": "gmt-update", "stage": 3, "clip": 0.1, "decay": 0.1, "deepspeed": RELEASED},
        {"method": "mofo", "stage": 1, "clip": 0.1, "decay": 0.1},
        {"method": "mofo", "stage": 3, "accumulation": 3, "deepspeed": RELEASED},
    ],
}
STATES = [
    {"method": "gmt-update", "stages": [2, 2], "decay": 0.1, "clip": 0.1},
    {"method": "mofo", "stages": [3, 3], "decay": 0.1},
    {"method": "mofo", "stages": [1, 3], "clip": 0.1},
]
BAD = [
    {"method": "gmt", "stage": 2, "kind": "loss"},
    {"method": "mofo", "stage": 3, "kind": "gradient", "decay": 0.1},
    {"method": "mofo", "stage": 1, "kind": "gradient", "offload": True},
]


@pytest.fixture(scope="module")
def reports(request: pytest.FixtureRequest) -> Reports:
    return run_by_world(request, f"{JOBS}:run_cases", CASES)


@pytest.mark.parametrize(("world", "case"), by_world(CASES))
def test_equals_the_dense_oracle(reports: Reports, world: int, case: int) -> None:
    report, settings = reports[world][case], CASES[world][case]
    exact = settings.get("dtype") != "bfloat16"
    assert report["chosen"] > 0
    assert report["masks"] == [], "the gradient is not that of the largest elements"
    assert report["moved"] == [], "an element moved that was not chosen"
    if exact:
        assert report["other"] == 0, "other elements than the oracle's"
        assert report["wrong"] == [], "a chosen element did not move"
    assert report["apart"] <= (1e-6 if exact else 6e-2)
    assert report["moments"] <= (1e-6 if exact else 2e-2)
    assert report["weights"] <= (1e-6 if exact else 6e-2)


def test_goes_on_from_a_saved_state(tmp_path: Path) -> None:
    """Bit for bit under the same stage, and up to rounding under another."""
    found = run_ranks(f"{JOBS}:through_states", 2, {"cases": STATES, "folder": str(tmp_path)}, timeout=300)[0]
    assert found == [[]] * len(STATES)


def test_a_skipped_step_leaves_no_trace() -> None:
    for report in run_ranks(f"{JOBS}:past_a_nan", 2, {"cases": BAD}, timeout=300)[0]:
        assert "not finite" in report["skipped"] or "is nan" in report["skipped"]
        assert report["changed"] == []
        assert report["differs"] == []
