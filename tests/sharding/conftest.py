"""One start of two ranks for all test files of this folder."""

from __future__ import annotations

from typing import Any

import pytest

from tests.ranks import run_ranks

FLOAT32_ACCUMULATION = {"data_types": {"grad_accum_dtype": "fp32"}}
LAYOUTS: dict[str, dict[str, Any]] = {
    "stage 0": {"stage": 0},
    "stage 0 in bfloat16": {"stage": 0, "dtype": "bfloat16"},
    "stage 1": {"stage": 1},
    "stage 1 in bfloat16": {"stage": 1, "dtype": "bfloat16", "more": FLOAT32_ACCUMULATION},
    "stage 2": {"stage": 2},
    "stage 2 offloaded": {"stage": 2, "more": {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}},
    "stage 2, another AdamW": {"stage": 2, "more": {"fused": False}},
    "stage 3": {"stage": 3},
    "stage 3 without small ones": {
        "stage": 3,
        "more": {"zero_optimization": {"stage3_param_persistence_threshold": 0}},
    },
}


@pytest.fixture(scope="session")
def every_layout() -> list[dict[str, Any]]:
    """Per rank, what `tests.sharding.jobs` reports by name of a layout, as `refused` the message for one, and as `maps`
    the pieces of `map_jobs`."""
    return run_ranks("tests.sharding.jobs:run", 2, {"layouts": LAYOUTS}, timeout=300)


@pytest.fixture(params=LAYOUTS)
def ranks(request: pytest.FixtureRequest, every_layout: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The reports of both ranks under one layout."""
    return [{"layout": request.param, **report[request.param]} for report in every_layout]


@pytest.fixture
def bound(ranks: list[dict[str, Any]]) -> float:
    """How far a gradient may be from that of the whole model, relative to its largest element."""
    return 2e-2 if "bfloat16" in ranks[0]["layout"] else 1e-5
