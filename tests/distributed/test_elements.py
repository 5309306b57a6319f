"""GMT and MoFO choose the same elements on 1, 2 and 3 ranks as a dense run that sorts whole tensors."""

from __future__ import annotations

from typing import Any

import pytest

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
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    found = {}
    for world, cases in CASES.items():
        arguments: dict[str, Any] = {"cases": cases}
        if world == 2:
            arguments |= {"folder": str(tmp_path_factory.mktemp("states")), "states": STATES, "bad": BAD}
        found[world] = run_ranks(f"{JOBS}:run_all", world, arguments, timeout=600)[0]
    return found


def named(case: dict[str, Any]) -> str:
    return "-".join(map(str, case.values()))


@pytest.mark.parametrize(
    ("world", "number"),
    [
        pytest.param(world, number, id=f"{named(case)}-{world}")
        for world, cases in CASES.items()
        for number, case in enumerate(cases)
    ],
)
def test_equals_the_dense_oracle(reports: dict[int, Any], world: int, number: int) -> None:
    report, case = reports[world]["cases"][number], CASES[world][number]
    exact = case.get("dtype") != "bfloat16"
    assert report["chosen"] > 0
    assert report["masks"] == [], "the gradient is not that of the largest elements"
    assert report["moved"] == [], "an element moved that was not chosen"
    if exact:
        assert report["other"] == 0, "other elements than the oracle's"
        assert report["wrong"] == [], "a chosen element did not move"
    assert report["apart"] <= (1e-6 if exact else 6e-2)
    assert report["moments"] <= (1e-6 if exact else 2e-2)
    assert report["weights"] <= (1e-6 if exact else 6e-2)


@pytest.mark.parametrize("number", range(len(STATES)), ids=map(named, STATES))
def test_goes_on_from_a_saved_state(reports: dict[int, Any], number: int) -> None:
    assert reports[2]["states"][number] == []


@pytest.mark.parametrize("number", range(len(BAD)), ids=map(named, BAD))
def test_a_skipped_step_leaves_no_trace(reports: dict[int, Any], number: int) -> None:
    report = reports[2]["bad"][number]
    assert "not finite" in report["skipped"] or "is nan" in report["skipped"]
    assert report["changed"] == []
    assert report["differs"] == []
